"""Outer gradients of the path that this peer trains, until a certificate says what became of them.

Encoding one takes a while, and is done on a copy of the parameters, while training goes on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dipaco.compression import WireFormat, corrected, encode, lost
from dipaco.digest import blob_digest
from dipaco.tensors import new_vector
from dipaco.topology import ModuleID


@dataclass(slots=True)
class Base:
    """Where a module's progress is counted from."""

    version: int
    state: str  # digest
    parameters: Tensor
    tokens: int = 0  # trained since


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One module's outer gradient of one slot, encoded."""

    module: ModuleID
    base_version: int
    base_state: str
    tokens: int
    raw: bytes


class Draft:
    """One module's progress at the end of a slot, until a certificate says whether it counted."""

    def __init__(
        self,
        module: ModuleID,
        base: Base,
        parameters: Tensor,
        residual: Tensor | None,
        wire_format: WireFormat,
    ) -> None:
        self.parameters = parameters  # when it was taken; nobody writes into them
        self.tokens = base.tokens
        self.blob = ""  # digest of what it was encoded to; empty until then
        self._module = module
        self._version, self._state, self._base = base.version, base.state, base.parameters
        self._residual = residual
        self._wire_format: WireFormat = wire_format
        self._encoded: tuple[Tensor, bytes] | None = None

    def encode(self) -> Offer:
        """The outer gradient (old minus new, and what earlier ones lost), on any thread."""
        vector = torch.sub(self._base, self.parameters, out=new_vector(len(self._base)))
        vector = corrected(vector, self._residual)
        raw = encode(vector, self._wire_format)
        self._encoded = vector, raw
        self.blob = blob_digest(raw)
        return Offer(
            module=self._module,
            base_version=self._version,
            base_state=self._state,
            tokens=self.tokens,
            raw=raw,
        )

    def lost(self) -> Tensor | None:
        """What stays behind if it counts; on any thread."""
        assert self._encoded is not None, "what counts was encoded"
        return lost(*self._encoded, self._wire_format)
