"""Which rows a step trains on, and what it needs to know of them."""

# ruff: noqa: N803, N806, N815 - tensors carry their shape in their name: B sequences, T tokens,
# N positions

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dipaco.evaluate import IGNORED, targets_of
from dipaco.shards import Rows
from dipaco.topology import PathID

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Batches:
    """The training rows of a path in endless random order, addressed by the batch's number."""

    def __init__(self, rows: Rows, *, batch_sequences: int, seed: int, path: PathID) -> None:
        self._rows = rows
        self._batch_sequences = batch_sequences
        self._entropy = (seed, 0, len(path.experts), *path.experts)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, number: int) -> Tensor:
        """Tokens [B, T] (int64) of one batch. Each epoch has every row once, in a new order."""
        start = number * self._batch_sequences
        picked = [self._row_number(start + i) for i in range(self._batch_sequences)]
        return torch.from_numpy(self._rows[picked].astype(np.int64))

    def _row_number(self, position: int) -> int:
        epoch, index = divmod(position, len(self._rows))
        if epoch not in self._orders:
            generator = np.random.default_rng((*self._entropy, epoch))
            # A batch spans few epochs; older orders are not needed again.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = generator.permutation(len(self._rows))
        return int(self._orders[epoch][index])


class StepInputs(NamedTuple):
    """What one inner step trains on."""

    tokens_BT: Tensor
    positions_N: Tensor  # of the B x T, those whose next token is to be predicted
    targets_N: Tensor  # these tokens; IGNORED at positions that only fill up


def step_inputs(tokens_BT: Tensor, *, prefix_tokens: int, pad: int, fill_up: bool) -> StepInputs:
    """The inputs of a step, on the CPU; `prefix_tokens` as in `targets_of`.

    With `fill_up`, N is the same for every batch of a shape, whatever padding it has.
    """
    targets = targets_of(tokens_BT, prefix_tokens=prefix_tokens, pad=pad).flatten()
    positions_N = (targets != IGNORED).nonzero().flatten()
    targets_N = targets[positions_N]
    if fill_up:
        num_sequences, num_tokens = tokens_BT.shape
        num_missing = num_sequences * (num_tokens - max(prefix_tokens, 1)) - len(targets_N)
        positions_N = F.pad(positions_N, (0, num_missing))
        targets_N = F.pad(targets_N, (0, num_missing), value=IGNORED)
    return StepInputs(tokens_BT, positions_N, targets_N)
