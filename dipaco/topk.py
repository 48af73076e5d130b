"""Outer gradients of which only the largest values are sent (SparseLoCo, arXiv 2508.15706)."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dipaco.codec import MAX_BFLOAT16, PART_VALUES, Bodies, Codec, bfloat16s
from dipaco.tensors import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


class TopKCodec(Codec):
    """The largest 64 of every 4096 values, with 2 bits each.

    A kept value is its sign and whether it is above or below the middle of what is kept: two
    bfloat16 magnitudes per chunk, the means of either group. All other values are 0; what they were
    waits in the sender's residual. 18.5 bits per kept value make 0.29 bits per value.
    """

    chunk_values = 4096
    kept_values = 64

    def layout(self, num_values: int) -> Layout:
        """See `Codec`."""
        num_chunks = math.ceil(num_values / self.chunk_values)
        return {
            "places": (torch.uint16, (num_chunks, self.kept_values)),
            "codes": (torch.uint8, (num_chunks, self.kept_values // 4)),
            "magnitudes": (torch.bfloat16, (num_chunks, 2)),
        }

    def encode(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Codec`."""
        num_chunks = math.ceil(len(vector) / self.chunk_values)
        places = np.empty((num_chunks, self.kept_values), np.uint16)
        kept = np.empty((num_chunks, self.kept_values), np.float32)
        values = vector.numpy()
        for start in range(0, len(values), PART_VALUES):
            part = values[start : start + PART_VALUES]
            if len(part) % self.chunk_values:
                part = np.pad(part, (0, -len(part) % self.chunk_values))
            chunks = part.reshape(-1, self.chunk_values)
            order = np.argpartition(np.abs(chunks), -self.kept_values, axis=1)
            found = np.sort(order[:, -self.kept_values :], axis=1)
            first = start // self.chunk_values
            places[first : first + len(chunks)] = found
            kept[first : first + len(chunks)] = np.take_along_axis(chunks, found, axis=1)
        sizes = np.abs(kept)
        is_large = sizes > sizes.mean(axis=1, keepdims=True)
        magnitudes = np.stack([_mean(sizes, ~is_large), _mean(sizes, is_large)], axis=1)
        codes = (kept < 0).astype(np.uint8) | is_large.astype(np.uint8) << 1
        fours = codes.reshape(num_chunks, -1, 4)
        packed = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
        rounded = torch.from_numpy(magnitudes).clamp_(max=MAX_BFLOAT16).bfloat16()
        return {
            "places": torch.from_numpy(places),
            "codes": torch.from_numpy(packed),
            "magnitudes": rounded,
        }

    def check(self, bodies: Bodies, num_values: int) -> None:
        """Each place once, in ascending order, and inside its chunk (but for the padded end)."""
        places = np.frombuffer(bodies["places"], np.uint16).reshape(-1, self.kept_values)
        if not (places[:, 1:] > places[:, :-1]).all() or (places >= self.chunk_values).any():
            raise ValueError("places out of order or out of range")

    def part(self, bodies: Bodies, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Codec`."""
        first = start // self.chunk_values
        last = math.ceil(stop / self.chunk_values)
        places = _rows(bodies["places"], np.uint16, self.kept_values)[first:last]
        codes = _rows(bodies["codes"], np.uint8, self.kept_values // 4)[first:last]
        pairs = bfloat16s(bodies["magnitudes"], 2 * first, 2 * last).reshape(-1, 2)
        signed = np.stack([pairs[:, 0], -pairs[:, 0], pairs[:, 1], -pairs[:, 1]], axis=1)
        unpacked = (codes[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(
            len(codes), self.kept_values
        )
        chunks = scratch[: len(places) * self.chunk_values].reshape(-1, self.chunk_values)
        chunks[:] = 0.0
        np.put_along_axis(chunks, places.astype(np.int64), _pick(signed, unpacked), axis=1)
        return scratch[: stop - start]


def _pick(table: "Floats", columns: "NDArray[Any]") -> "Floats":
    return np.take_along_axis(table, columns.astype(np.int64), axis=1)


def _mean(sizes: "Floats", mask: "NDArray[np.bool_]") -> "Floats":
    """Mean of the masked values of each row; 0 where there are none."""
    counts = np.maximum(mask.sum(axis=1), 1)
    means: Floats = ((sizes * mask).sum(axis=1) / counts).astype(np.float32)
    return means


def _rows(body: memoryview, dtype: type[Any], width: int) -> "NDArray[Any]":
    return np.frombuffer(body, dtype).reshape(-1, width)
