"""Outer gradients on the wire: encoded with error feedback, checked, and read part by part."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from dipaco.blocks import Int4Codec, Int8Codec
from dipaco.codec import PART_VALUES, Codec, PlainCodec
from dipaco.errors import BadContribution
from dipaco.gradient import exact_norm
from dipaco.tensors import encode_tensors, is_finite, split_tensors
from dipaco.tensors import encoded_bytes as bytes_of_layout
from dipaco.topk import TopKCodec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

WireFormat = Literal["float32", "float16", "int8", "int4", "topk"]

_CODECS: Mapping[WireFormat, Codec] = {
    "float32": PlainCodec(torch.float32),
    "float16": PlainCodec(torch.float16),
    "int8": Int8Codec(),
    "int4": Int4Codec(),
    "topk": TopKCodec(),
}


class EncodedGradient:
    """An outer gradient as it came over the wire.

    Nothing is copied: `raw` may be a mapped file. BadContribution if it is not `num_parameters`
    values in this format; the size is checked before anything else.
    """

    def __init__(
        self, raw: bytes | memoryview, wire_format: WireFormat, *, num_parameters: int
    ) -> None:
        self.num_values = num_parameters
        self._codec = _CODECS[wire_format]
        try:
            self._bodies = split_tensors(raw, self._codec.layout(num_parameters))
            self._codec.check(self._bodies, num_parameters)
        except ValueError as error:
            raise BadContribution(f"not an outer gradient: {error}") from error

    @cached_property
    def norm(self) -> float:
        """The exact norm; BadContribution if a value is not finite."""
        squares = self._codec.sum_of_squares(self._bodies, self.num_values)
        norm = exact_norm(self) if squares is None else math.sqrt(squares)
        if not math.isfinite(norm):
            raise BadContribution("not an outer gradient: a value is not finite")
        return norm

    def check(self) -> None:
        """Raise BadContribution unless every value is finite."""
        assert math.isfinite(self.norm)

    def part(self, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Gradient`."""
        return self._codec.part(self._bodies, start, stop, scratch)

    def add_part(
        self, start: int, stop: int, factor: np.float32, total: "Floats", scratch: "Floats"
    ) -> None:
        """See `Gradient`."""
        self._codec.add_part(self._bodies, start, stop, factor, total, scratch)


def encode(vector: Tensor, wire_format: WireFormat) -> bytes:
    """A 1-D float32 CPU vector as safetensors; BadContribution if a value is not finite."""
    if not is_finite(vector):
        raise BadContribution(
            "an outer gradient is not finite", hint="training has diverged; lower the learning rate"
        )
    return encode_tensors(_CODECS[wire_format].encode(vector))


def decode(raw: bytes | memoryview, wire_format: WireFormat, *, num_parameters: int) -> Tensor:
    """The whole 1-D float32 vector that `raw` stands for, the same bits everywhere.

    BadContribution if it is not `num_parameters` finite values in this format.
    """
    gradient = EncodedGradient(raw, wire_format, num_parameters=num_parameters)
    gradient.check()
    vector = np.empty(num_parameters, np.float32)
    scratch = np.empty(PART_VALUES, np.float32)
    for start in range(0, num_parameters, PART_VALUES):
        stop = min(start + PART_VALUES, num_parameters)
        vector[start:stop] = gradient.part(start, stop, scratch)
    return torch.from_numpy(vector)


def encoded_bytes(wire_format: WireFormat, num_parameters: int) -> int:
    """Exact length of an encoded vector."""
    return bytes_of_layout(_CODECS[wire_format].layout(num_parameters))


def corrected(gradient: Tensor, residual: Tensor | None) -> Tensor:
    """What to encode: `gradient` plus what earlier rounds lost (error feedback).

    `residual` is what `lost` returned for this module, or None at the beginning.
    """
    return gradient if residual is None else gradient + residual


def lost(vector: Tensor, raw: bytes, wire_format: WireFormat) -> Tensor | None:
    """The residual: what encoding `vector` to `raw` lost; None for float32, which loses nothing."""
    if wire_format == "float32":
        return None
    gradient = EncodedGradient(raw, wire_format, num_parameters=len(vector))
    residual = vector.numpy().copy()
    scratch = np.empty(PART_VALUES, np.float32)
    for start in range(0, len(residual), PART_VALUES):
        part = residual[start : start + PART_VALUES]
        part -= gradient.part(start, start + len(part), scratch)
    return torch.from_numpy(residual)


def compress_with_feedback(
    gradient: Tensor, residual: Tensor | None, wire_format: WireFormat
) -> tuple[bytes, Tensor | None]:
    """Encode `gradient` plus what earlier rounds lost; return the bytes and what is lost now."""
    vector = corrected(gradient, residual)
    raw = encode(vector, wire_format)
    return raw, lost(vector, raw, wire_format)
