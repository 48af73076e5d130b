"""Changing the path within a sequence at test time, every W tokens (paper 2.4.3, 7.2.2).

The prefix chooses the path of the first W tokens after it, as in training. At each later boundary
the tokens so far choose the path of the next W tokens: with the router of the run, which looks at
the last `prefix_tokens` tokens before the boundary as if they began a sequence; or with a
token-level router that was trained for it (`dipaco.token_router`).
"""

# ruff: noqa: N806 - arrays carry their shape in their name: N sequences, T tokens, C chunks

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipaco.config import ModelConfig
from dipaco.evaluate import Evaluation, token_nll
from dipaco.routing import FeatureExtractor, Router, ranking
from dipaco.shards import Rows

Choices = NDArray[np.int64]
"""The path number [N, C] of each chunk of each sequence."""


def boundaries(*, prefix_tokens: int, sequence_tokens: int, every: int) -> list[int]:
    """Where a path is chosen: after the prefix and, unless `every` is 0, each `every` tokens on."""
    return list(range(prefix_tokens, sequence_tokens, every or sequence_tokens))


def choices_of_router(
    router: Router,
    rows: Rows,
    features: FeatureExtractor,
    *,
    prefix_tokens: int,
    at: Sequence[int],
) -> Choices:
    """The path of each chunk by the run's router, from the last tokens before each boundary."""
    chosen = [
        ranking(
            router,
            np.ascontiguousarray(rows[:, boundary - prefix_tokens : boundary]),
            features,
            prefix_tokens=prefix_tokens,
            num_best=1,
        )
        for boundary in at
    ]
    return np.concatenate(chosen, axis=1)


def evaluate_choices(
    forward_of: Callable[[int], Callable[[Tensor], Tensor]],
    rows: Rows,
    choices: Choices,
    *,
    at: Sequence[int],
    model: ModelConfig,
    device: torch.device | str = "cpu",
) -> dict[int, Evaluation]:
    """Score each chunk with the path chosen for it; by path number. One path is used at a time.

    `forward_of(number)` gives the logits function of a path, on `device`. A path sees all tokens
    before those it is scored on, whichever path was responsible for them.
    """
    lengths = np.diff([*at, rows.shape[1]])
    evaluations = {}
    for number in np.unique(choices):
        concerned = np.flatnonzero((choices == number).any(axis=1))
        tokens_NT = torch.from_numpy(np.asarray(rows[concerned]).astype(np.int64)).to(device)
        nll_NT = token_nll(
            forward_of(int(number)),
            tokens_NT,
            prefix_tokens=at[0],
            model=model,
        )
        mine_NT = np.repeat(choices[concerned] == number, lengths, axis=1)
        counted_NT = torch.from_numpy(mine_NT) & (tokens_NT[:, at[0] :] != model.pad_token).cpu()
        evaluations[int(number)] = Evaluation(
            nll_sum=float(nll_NT[:, at[0] :][counted_NT].double().sum()),
            num_tokens=int(counted_NT.sum()),
        )
    return evaluations
