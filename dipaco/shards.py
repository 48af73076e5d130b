"""The data of one path: rows of tokens to train on, and rows to validate on.

A row is one sequence of `sequence_tokens` 16-bit tokens, padded at its end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dipaco.errors import BadBytes, ConfigError
from dipaco.tensors import decode_tensors, encode_tensors, layout_of
from dipaco.topology import PathID, Topology

Rows = NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shard:
    """The rows [n, T] and [m, T] that the router gave to one path, in random order."""

    path: PathID
    train: Rows
    valid: Rows

    def num_tokens(self, pad_token: int) -> int:
        """Number of training tokens, padding not counted: the path's weight in its modules."""
        return int((self.train != pad_token).sum())

    def to_bytes(self) -> bytes:
        """The rows as safetensors; the path is known from the manifest."""
        return encode_tensors(
            {"train": torch.from_numpy(self.train), "valid": torch.from_numpy(self.valid)}
        )

    @classmethod
    def from_bytes(
        cls, raw: bytes | memoryview, *, path: PathID, sequence_tokens: int, vocab_size: int
    ) -> "Shard":
        """The inverse of `to_bytes`; BadBytes if it is not a shard of these dimensions."""
        try:
            layout = layout_of(raw)
            if set(layout) != {"train", "valid"}:
                raise ValueError("a shard is made of train and valid")
            for dtype, shape in layout.values():
                if dtype != torch.uint16 or len(shape) != 2 or shape[1] != sequence_tokens:
                    raise ValueError(f"a shard has rows of {sequence_tokens} tokens")
            rows = {name: tensor.numpy() for name, tensor in decode_tensors(raw, layout).items()}
        except ValueError as error:
            raise BadBytes(f"not the shard of path {path}: {error}") from error
        if not len(rows["train"]) or any((part >= vocab_size).any() for part in rows.values()):
            raise BadBytes(f"not the shard of path {path}: it is empty or has unknown tokens")
        return cls(path=path, train=rows["train"], valid=rows["valid"])


def split_into_shards(
    topology: Topology,
    rows: Mapping[str, tuple[Rows, NDArray[np.int64]]],
    seed: int,
) -> dict[PathID, Shard]:
    """Give each path its rows. `rows` has "train" and "valid": rows, and path number of each.

    ConfigError if a path would have no training or no validation rows.
    """
    generator = np.random.default_rng(seed)
    shards = {}
    for index, path in enumerate(topology.paths):
        parts = {}
        for name, (tokens, assigned) in rows.items():
            # Shuffled, so that the first rows are a fair sample of all.
            parts[name] = generator.permutation(tokens[assigned == index])
            if not len(parts[name]):
                raise ConfigError(
                    f"the shard of path {path} has no {name} sequences",
                    hint="raise corpus.max_documents or corpus.valid_fraction, or lower "
                    "topology.levels",
                )
        shards[path] = Shard(path=path, train=parts["train"], valid=parts["valid"])
    return shards


def union_of(shards: Mapping[PathID, Shard]) -> Shard:
    """All shards as one, for the dense model, which is a network of a single path."""
    return Shard(
        path=PathID((0,)),
        train=np.concatenate([shard.train for shard in shards.values()]),
        valid=np.concatenate([shard.valid for shard in shards.values()]),
    )
