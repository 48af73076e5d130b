"""What a wire format is: how values are laid out, and how any part of them is read.

A codec turns a float32 vector into a few flat tensors, and any aligned part of these back into
values. Reading is a table lookup and one float32 multiplication, or less, so that it gives the same
bits on every machine; how the rounding is done does not matter to anyone but the sender.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dipaco.tensors import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

PART_VALUES = 2**16
"""Values worked on at a time, so that all that is made of them stays in a cache. Parts begin at
multiples of this, and so no format's block is ever cut.
"""

Bodies = Mapping[str, memoryview]
"""The bytes of each tensor of an encoded vector."""


class Codec(Protocol):
    """One wire format. What has a body here is for formats that know nothing quicker."""

    def layout(self, num_values: int) -> Layout:
        """Of what tensors an encoded vector is made."""

    def encode(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of a finite 1-D float32 CPU vector."""

    def check(self, bodies: Bodies, num_values: int) -> None:
        """Raise ValueError if the bytes say what this format cannot (values that are not finite
        excepted: whoever adds them up sees those).
        """

    def part(self, bodies: Bodies, start: int, stop: int, scratch: "Floats") -> "Floats":
        """Values `start` to `stop`, at most `PART_VALUES` from a multiple of it on.

        In `scratch`, which has room for a whole part, or a view of the bytes themselves.
        """

    def add_part(
        self,
        bodies: Bodies,
        start: int,
        stop: int,
        factor: np.float32,
        total: "Floats",
        scratch: "Floats",
    ) -> None:
        """Add values `start` to `stop` times `factor` to `total`.

        The same bits in every format: value, product and sum are rounded once each.
        """
        from dipaco import kernels

        kernels.add_multiplied(self.part(bodies, start, stop, scratch), factor, total)

    def sum_of_squares(self, bodies: Bodies, num_values: int) -> float | None:
        """Of all values, the same bits on every machine, and not finite if a value is not.

        None if it takes every value to know: then `dipaco.gradient.exact_norm` does.
        """
        return None


_MAX_FLOAT16 = 65504.0
MAX_BFLOAT16 = torch.finfo(torch.bfloat16).max


class PlainCodec(Codec):
    """float32 or float16 values as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def layout(self, num_values: int) -> Layout:
        """See `Codec`."""
        return {"values": (self._dtype, (num_values,))}

    def encode(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Codec`."""
        if self._dtype is torch.float32:
            return {"values": vector}
        # From numpy, as `new_vector`. Part by part, so that what is clamped stays in a cache.
        halves = torch.from_numpy(np.empty(len(vector), np.float16))
        clamped = torch.empty(PART_VALUES)
        for start in range(0, len(vector), PART_VALUES):
            part = vector[start : start + PART_VALUES]
            some = torch.clamp(part, -_MAX_FLOAT16, _MAX_FLOAT16, out=clamped[: len(part)])
            halves[start : start + len(part)] = some
        return {"values": halves}

    def check(self, bodies: Bodies, num_values: int) -> None:
        """See `Codec`."""

    def part(self, bodies: Bodies, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Codec`."""
        size = self._dtype.itemsize
        body = bodies["values"][start * size : stop * size]
        if self._dtype is torch.float32:
            return np.frombuffer(body, np.float32)
        # By torch, which has the processor's instruction for it; this is exact, since every half is
        # a float32. It takes no memory that is read-only, and a part is copied in no time.
        halves = torch.from_numpy(np.frombuffer(body, np.float16).copy())
        values = scratch[: stop - start]
        torch.from_numpy(values).copy_(halves)
        return values


def bfloat16s(body: memoryview, start: int, stop: int) -> "Floats":
    """bfloat16 values as float32: exact, since they are its upper half."""
    halves = np.frombuffer(body[2 * start : 2 * stop], np.uint16).astype(np.uint32)
    halves <<= 16
    return halves.view(np.float32)
