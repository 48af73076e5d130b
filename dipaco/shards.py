"""The data of one path: rows of tokens to train on, and rows to validate on.

A row is one sequence of `sequence_tokens` 16-bit tokens, padded at its end.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dipaco.checkpoint import replacing
from dipaco.errors import BadBytes
from dipaco.tensors import Layout, encode_header, encoded_bytes, layout_of
from dipaco.topology import PathID

Rows = NDArray[np.uint16]
Selection = tuple[Rows, NDArray[np.int64]]
"""Rows, and the numbers of those that are meant, in order."""

_PART_BYTES = 2**24  # rows that are looked at or copied at once


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shard:
    """The rows [n, T] and [m, T] that the router gave to one path, in random order."""

    path: PathID
    train: Rows
    valid: Rows

    def num_tokens(self, pad_token: int) -> int:
        """Number of training tokens, padding not counted: the path's weight in its modules."""
        return sum(
            int(np.count_nonzero(self.train[part] != pad_token))
            for part in _slices(*self.train.shape)
        )

    def to_bytes(self) -> bytes:
        """The rows as safetensors; the path is known from the manifest."""
        header = encode_header(_layout(self.train.shape, self.valid.shape))
        return b"".join([header, self.train.tobytes(), self.valid.tobytes()])

    @classmethod
    def from_bytes(
        cls, raw: bytes | memoryview, *, path: PathID, sequence_tokens: int, vocab_size: int
    ) -> "Shard":
        """The inverse of `to_bytes`, without a copy: the rows are views of `raw`, read-only.

        BadBytes if it is not a shard of these dimensions, with at least one row to train on.
        """
        try:
            rows = _rows_in(memoryview(raw), sequence_tokens)
        except ValueError as error:
            raise BadBytes(f"not the shard of path {path}: {error}") from error
        # The maximum needs no temporary array, however many rows there are.
        if not len(rows["train"]) or any(
            part.max(initial=0) >= vocab_size for part in rows.values()
        ):
            raise BadBytes(f"not the shard of path {path}: it is empty or has unknown tokens")
        return cls(path=path, train=rows["train"], valid=rows["valid"])

    @classmethod
    def load(cls, file: Path, *, path: PathID, sequence_tokens: int, vocab_size: int) -> "Shard":
        """`from_bytes` of a file that is mapped instead of read, so that it may exceed the memory.

        OSError if it cannot be read. Until the shard is forgotten the file may be replaced or
        deleted, but not changed in place.
        """
        with file.open("rb") as stream:
            try:
                raw = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError as error:
                raise BadBytes(f"not the shard of path {path}: {error}") from error
        return cls.from_bytes(
            raw, path=path, sequence_tokens=sequence_tokens, vocab_size=vocab_size
        )


def evenly_spread(rows: Rows, max_rows: int) -> Rows:
    """At most so many of the rows: not the first ones, because neighbours are of one document."""
    if len(rows) <= max_rows:
        return rows
    return np.asarray(rows[np.linspace(0, len(rows) - 1, max_rows).astype(np.int64)])


def write_shard(file: Path, *, train: Selection, valid: Selection) -> None:
    """Write the shard of these rows, whole or not at all: the bytes of `Shard.to_bytes`.

    Rows are copied a few at a time, so those of a memory map never are in memory together.
    """
    layout = _layout(*((len(numbers), rows.shape[1]) for rows, numbers in (train, valid)))
    with replacing(file) as stream:
        stream.write(encode_header(layout))
        for rows, numbers in (train, valid):
            for part in _slices(len(numbers), rows.shape[1]):
                stream.write(rows[numbers[part]].data)


def _slices(num_rows: int, sequence_tokens: int) -> Iterator[slice]:
    """Slices of `num_rows` rows, of few bytes each."""
    step = max(1, _PART_BYTES // (2 * sequence_tokens))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _layout(train_shape: tuple[int, ...], valid_shape: tuple[int, ...]) -> Layout:
    """A shard's layout; train lies before valid."""
    return {"train": (torch.uint16, train_shape), "valid": (torch.uint16, valid_shape)}


def _rows_in(raw: memoryview, sequence_tokens: int) -> dict[str, Rows]:
    """The two parts of an encoded shard; ValueError if it is none."""
    claimed = layout_of(raw)
    if set(claimed) != {"train", "valid"}:
        raise ValueError("a shard is made of train and valid")
    for dtype, shape in claimed.values():
        if dtype != torch.uint16 or len(shape) != 2 or shape[1] != sequence_tokens:
            raise ValueError(f"a shard has rows of {sequence_tokens} tokens")
    layout = _layout(claimed["train"][1], claimed["valid"][1])
    header = encode_header(layout)
    if len(raw) != encoded_bytes(layout) or raw[: len(header)] != header:
        raise ValueError("its size or header is not that of its rows")
    rows = np.frombuffer(raw, dtype=np.uint16, offset=len(header)).reshape(-1, sequence_tokens)
    num_train = layout["train"][1][0]
    return {"train": rows[:num_train], "valid": rows[num_train:]}
