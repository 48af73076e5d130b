"""A path as it was when it did best on its shard's validation part (early stopping, paper 2.7).

It is kept beside the training, which goes on from the newest parameters all the same; whoever uses
the path takes it as it did best.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dipaco.checkpoint import write_tensors
from dipaco.digest import blob_digest
from dipaco.evaluate import Evaluation
from dipaco.shards import Rows
from dipaco.tensors import layout_of, split_tensors
from dipaco.topology import ModuleID

_ROUND, _PERPLEXITY, _ROWS = "round", "perplexity", "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The parameters of a path's modules after `round`, each a flat vector, mapped from a file.

    `rows` is the digest of the validation rows on which it had this perplexity.
    """

    round: int
    perplexity: float
    rows: str
    parameters: Mapping[ModuleID, Tensor]

    def is_on(self, rows: Rows) -> bool:
        """Whether these are the rows; what did best on others, of a shard before, is not the best.

        Nothing is on no rows: then there is no telling what does best.
        """
        return self.rows == _digest(rows)


def keep_if_best(
    file: Path,
    parameters: Mapping[ModuleID, Tensor],
    evaluation: Evaluation,
    *,
    rows: Rows,
    round_number: int,
    flush: bool = True,
) -> bool:
    """Replace what `file` holds, unless that did better on the same `rows`.

    Perplexities on other rows, such as those before the data was sharded anew, say nothing.
    """
    if not evaluation.num_tokens:
        return False
    before = _read(file)
    limit = before.perplexity if before is not None and before.is_on(rows) else math.inf
    if limit <= evaluation.perplexity:
        return False
    facts = {
        _ROUND: torch.tensor(round_number),
        _PERPLEXITY: torch.tensor(evaluation.perplexity, dtype=torch.float32),
        _ROWS: torch.frombuffer(bytearray(_digest(rows).encode()), dtype=torch.uint8),
    }
    vectors = {str(module): vector for module, vector in parameters.items()}
    write_tensors(file, facts | vectors, flush=flush)
    return True


def read_best(file: Path, sizes: Mapping[ModuleID, int]) -> Best | None:
    """What `keep_if_best` kept last of a path whose modules have these numbers of parameters.

    None if that is nothing, or damaged, or of other modules. `Best.is_on` tells whether it is still
    the best.
    """
    best = _read(file)
    if best is None or {m: len(vector) for m, vector in best.parameters.items()} != sizes:
        return None
    return best


def _digest(rows: Rows) -> str:
    return blob_digest(rows.tobytes())


def _read(file: Path) -> Best | None:
    try:
        # Copied on writing, which nobody does: torch wants no memory that is read-only.
        raw = np.memmap(file, dtype=np.uint8, mode="c").data
        bodies = split_tensors(raw, layout_of(raw))
        return Best(
            round=int(np.frombuffer(bodies.pop(_ROUND), np.int64)[0]),
            perplexity=float(np.frombuffer(bodies.pop(_PERPLEXITY), np.float32)[0]),
            rows=bytes(bodies.pop(_ROWS)).decode(),
            parameters={
                ModuleID.parse(name): torch.from_numpy(np.frombuffer(body, np.float32))
                for name, body in bodies.items()
            },
        )
    except (OSError, ValueError, LookupError):
        return None
