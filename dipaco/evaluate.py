"""Perplexity and log-likelihoods, without the routing prefix and without padding (paper 2.4).

The first `prefix_tokens` tokens of a sequence chose its path, so no model is scored on them;
this holds for dense models too.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dipaco.config import ModelConfig
from dipaco.device import autocast

IGNORED = -100  # torch's own mark for a target that does not count
_MAX_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # scored at a time: 64 and 512 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Summed negative log-likelihood (nats) over the tokens that count. Evaluations add up."""

    nll_sum: float
    num_tokens: int

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            nll_sum=self.nll_sum + other.nll_sum, num_tokens=self.num_tokens + other.num_tokens
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite if nothing was counted or it overflows."""
        mean = self.nll_sum / self.num_tokens if self.num_tokens else math.inf
        return math.exp(mean) if mean < 700 else math.inf


NOTHING = Evaluation(nll_sum=0.0, num_tokens=0)


def total(evaluations: Mapping[Any, Evaluation]) -> Evaluation:
    """The whole model: every sequence, or chunk of one, through the path that the router gives it.

    In the reports of rounds each path counts alike where shards have more validation rows than
    `rounds.eval_sequences`.
    """
    return sum(evaluations.values(), NOTHING)


def targets_of(tokens_BT: Tensor, *, prefix_tokens: int, pad: int) -> Tensor:
    """The token after each position [B, T]; IGNORED for padding, the prefix and the last one.

    `prefix_tokens` = 1 counts every token that has one before it.
    """
    targets_BT = torch.full_like(tokens_BT, IGNORED)
    start = max(prefix_tokens, 1)
    targets_BT[:, start - 1 : -1] = tokens_BT[:, start:]
    return targets_BT.masked_fill_(targets_BT == pad, IGNORED)


@torch.no_grad()
def token_nll(
    forward: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    *,
    prefix_tokens: int,
    model: ModelConfig,
) -> Tensor:
    """Negative log-likelihood (nats) [N, T] of each token, on the CPU; 0 where none counts."""
    num_tokens = tokens_NT.shape[1]
    parts = [torch.empty(0, num_tokens)]
    device = tokens_NT.device
    batch_sequences = max(1, _MAX_LOGITS[device.type] // (num_tokens * model.vocab_size))
    for tokens_BT in torch.split(tokens_NT, batch_sequences):
        targets_BT = targets_of(tokens_BT, prefix_tokens=prefix_tokens, pad=model.pad_token)
        with autocast(device):
            logits_BTV = forward(tokens_BT)
        nll = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            targets_BT.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        # A target stands where it was predicted; its token is one further on.
        parts.append(F.pad(nll.view(tokens_BT.shape)[:, :-1], (1, 0)).cpu())
    return torch.cat(parts)


def evaluate(
    forward: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    *,
    prefix_tokens: int,
    model: ModelConfig,
) -> Evaluation:
    """Score all sequences; `forward` gives logits [B, T, V] for tokens [B, T] on its device."""
    nll_NT = token_nll(forward, tokens_NT, prefix_tokens=prefix_tokens, model=model)
    targets_NT = targets_of(tokens_NT, prefix_tokens=prefix_tokens, pad=model.pad_token)
    return Evaluation(
        nll_sum=float(nll_NT.double().sum()), num_tokens=int((targets_NT != IGNORED).sum())
    )
