"""Outer gradients in blocks of 8-bit or 4-bit values with a scale each.

The 8-bit format is the dynamic one of Dettmers (arXiv 2110.02861): each block of 256 values is
divided by its largest magnitude and rounded to one of 256 values of a table. The kernels of
bitsandbytes round.

The 4-bit format divides each block of 64 values by the value of largest magnitude, sign included
(BOF4-S, arXiv 2505.06653), so that 1 needs a place in the table of 16 values but -1 does not. Two
values make a byte, the first in its low half.
"""

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipaco.codec import MAX_BFLOAT16, PART_VALUES, Bodies, bfloat16s
from dipaco.tensors import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LEAST_SCALE = 2.0**-100  # 127.5 / scale stays finite, and no decoded value is denormal


class Int8Codec:
    """Blocks of 256 values of 8 bits with a float32 scale."""

    block_values = 256  # one 4-byte scale per 256 bytes costs 1.6 %; larger ones lose small values

    def layout(self, num_values: int) -> Layout:
        """See `Codec`."""
        num_blocks = math.ceil(num_values / self.block_values)
        return {"values": (torch.uint8, (num_values,)), "scales": (torch.float32, (num_blocks,))}

    def encode(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Codec`."""
        # The package, not its `functional`: that one is there before the kernels are, and a thread
        # that asks for it while another one still imports the package would find none.
        import bitsandbytes

        values, state = bitsandbytes.functional.quantize_blockwise(
            vector, code=dynamic_table(), blocksize=self.block_values
        )
        return {"values": values.view(-1), "scales": state.absmax.view(-1)}

    def check(self, bodies: Bodies, num_values: int) -> None:
        """See `Codec`."""

    def part(self, bodies: Bodies, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Codec`."""
        values = np.frombuffer(bodies["values"][start:stop], np.uint8)
        np.take(dynamic_table().numpy(), values, out=scratch[: len(values)], mode="clip")
        scales = np.frombuffer(bodies["scales"], np.float32)[start // self.block_values :]
        return _scaled(scratch, len(values), scales, self.block_values)


class Int4Codec:
    """Blocks of 64 values of 4 bits with a bfloat16 scale."""

    block_values = 64  # one 2-byte scale per 32 bytes costs 6 %; with 128 errors grow by 4 to 20 %

    def layout(self, num_values: int) -> Layout:
        """See `Codec`."""
        num_blocks = math.ceil(num_values / self.block_values)
        packed = math.ceil(num_values / 2)
        return {"values": (torch.uint8, (packed,)), "scales": (torch.bfloat16, (num_blocks,))}

    def encode(self, vector: Tensor) -> dict[str, Tensor]:
        """Round to 256 even steps, then two values at once to the nearest of the table.

        Four times faster than a search in the table, for 0.3 % more error. In numpy, because torch
        would wait some thousand times for its other threads, which have a network to train.
        """
        num_blocks = math.ceil(len(vector) / self.block_values)
        packed = np.empty(num_blocks * self.block_values // 2, dtype=np.uint8)
        scales = np.empty(num_blocks, dtype=np.float32)
        values = vector.numpy()
        for start in range(0, len(values), PART_VALUES):
            part = values[start : start + PART_VALUES]
            if len(part) % self.block_values:
                part = np.pad(part, (0, -len(part) % self.block_values))
            blocks = part.reshape(-1, self.block_values)
            high, low = blocks.max(axis=1), blocks.min(axis=1)
            scale = np.where(high >= -low, high, low)
            scale[np.abs(scale) < _LEAST_SCALE] = 0.0
            first_block = start // self.block_values
            scales[first_block : first_block + len(blocks)] = scale
            factor = np.zeros_like(scale)
            np.divide(np.float32(127.5), scale, out=factor, where=scale != 0.0)
            steps = blocks * factor[:, None]
            steps += np.float32(128.0)
            pairs = steps.astype(np.uint8).reshape(-1).view(np.uint16)
            first_pair = start // 2
            found = packed[first_pair : first_pair + len(pairs)]
            np.take(_bytes_of_steps(), pairs, out=found, mode="clip")
        rounded = torch.from_numpy(scales).clamp_(-MAX_BFLOAT16, MAX_BFLOAT16).bfloat16()
        return {
            "values": torch.from_numpy(packed)[: math.ceil(len(values) / 2)],
            "scales": rounded,
        }

    def check(self, bodies: Bodies, num_values: int) -> None:
        """See `Codec`."""

    def part(self, bodies: Bodies, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Codec`."""
        packed = np.frombuffer(bodies["values"][start // 2 : (stop + 1) // 2], np.uint8)
        pairs = scratch[: 2 * len(packed)].view(np.uint64)
        np.take(_pairs_of_bytes(), packed, out=pairs, mode="clip")
        num_blocks = math.ceil((stop - start) / self.block_values)
        first_block = start // self.block_values
        scales = bfloat16s(bodies["scales"], first_block, first_block + num_blocks)
        return _scaled(scratch, stop - start, scales, self.block_values)


def _scaled(scratch: "Floats", num_values: int, scales: "Floats", block_values: int) -> "Floats":
    """The values in `scratch`, multiplied by the scales of their blocks."""
    whole = num_values // block_values
    blocks = scratch[: whole * block_values].reshape(-1, block_values)
    blocks *= scales[:whole, None]
    if num_values % block_values:
        scratch[whole * block_values : num_values] *= scales[whole]
    return scratch[:num_values]


@cache
def dynamic_table() -> Tensor:
    """The 256 values of the dynamic 8-bit format, ascending, in [-1, 1]; float32.

    Seven decades; decade i (1e-6 to 1) is divided evenly between 0.1 and 1 into 2**i values, each
    in both signs; then 0 and 1. Defined here rather than taken from a library, because decoded
    bits depend on it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        width = 0.9 / 2**decade
        for index in range(2**decade):
            value = 10.0 ** (decade - 6) * (0.1 + width * (index + 0.5))
            values += [value, -value]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def four_bit_table() -> Tensor:
    """The 16 values of the 4-bit format, ascending, in (-1, 1]; float32, exact.

    Lloyd's algorithm ends near these on the outer gradients of small language models, and on
    normal values. What they lose of an outer gradient is 7 to 8 % of its norm; of nf4 it is 9 %,
    of 15 even steps 7 to 10 %, of powers of two 18 %.
    """
    units = [-224, -179, -142, -110, -80, -53, -26, 0, 25, 50, 77, 104, 133, 166, 205, 256]
    return torch.tensor(units, dtype=torch.float32) / 256


@cache
def _bytes_of_steps() -> "NDArray[np.uint8]":
    """The byte of two values, by their steps: 0 to 255 for -1 to 1, the first in the low byte."""
    table = four_bit_table()
    middles = (torch.arange(256) - 127.5) / 127.5
    codes = torch.bucketize(middles, (table[1:] + table[:-1]) / 2).to(torch.uint8).numpy()
    found: NDArray[np.uint8] = (codes[None, :] | codes[:, None] << 4).reshape(-1)
    return found


@cache
def _pairs_of_bytes() -> "NDArray[np.uint64]":
    """What each byte of 4-bit values stands for: the eight bytes of two float32."""
    table, codes = four_bit_table().numpy(), np.arange(256)
    return np.stack([table[codes & 15], table[codes >> 4]], axis=1).view(np.uint64).reshape(-1)
