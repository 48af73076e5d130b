"""A path as it was when it did best on its shard's validation part (early stopping, paper 2.7).

Each peer keeps that of the paths that it trains, beside their optimizers. Training goes on from the
newest versions all the same; `dipaco-peer export --early-stopped` writes the best ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dipaco.checkpoint import write_atomically
from dipaco.evaluate import Evaluation
from dipaco.tensors import decode_tensors, encode_tensors, layout_of, split_tensors
from dipaco.topology import ModuleID

BEST_SUFFIX = ".best"
_ROUND, _PERPLEXITY, _ROWS = "round", "perplexity", "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The parameters of a path's modules after `round`, each a flat vector."""

    round: int
    perplexity: float
    parameters: Mapping[ModuleID, Tensor]


def keep_if_best(
    file: Path,
    parameters: Mapping[ModuleID, Tensor],
    evaluation: Evaluation,
    *,
    rows: str,
    round_number: int,
) -> bool:
    """Replace what `file` holds, unless that did better on the same `rows` (their digest)."""
    if not evaluation.num_tokens or _perplexity(file, rows) <= evaluation.perplexity:
        return False
    facts = {
        _ROUND: torch.tensor(round_number),
        _PERPLEXITY: torch.tensor(evaluation.perplexity, dtype=torch.float32),
        _ROWS: torch.frombuffer(bytearray(rows.encode()), dtype=torch.uint8),
    }
    vectors = {str(module): vector for module, vector in parameters.items()}
    write_atomically(file, encode_tensors(facts | vectors))
    return True


def read_best(file: Path) -> Best | None:
    """What `keep_if_best` kept last; None if that is nothing, or damaged."""
    try:
        raw = file.read_bytes()
        tensors = decode_tensors(raw, layout_of(raw))
        del tensors[_ROWS]
        return Best(
            round=int(tensors.pop(_ROUND)),
            perplexity=float(tensors.pop(_PERPLEXITY)),
            parameters={ModuleID.parse(name): vector for name, vector in tensors.items()},
        )
    except (OSError, ValueError, LookupError):
        return None


def _perplexity(file: Path, rows: str) -> float:
    """Of what is kept, on these rows; infinite if nothing is, or it was measured on others."""
    try:
        raw = np.memmap(file, dtype=np.uint8, mode="r").data  # parameters are not read
        bodies = split_tensors(raw, layout_of(raw))
        if bytes(bodies[_ROWS]) != rows.encode():
            return float("inf")
        [perplexity] = np.frombuffer(bodies[_PERPLEXITY], np.float32)
        return float(perplexity)
    except (OSError, ValueError, LookupError):
        return float("inf")
