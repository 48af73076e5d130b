"""The outer step of a module: weights, average, rescaling, Nesterov (paper 2.6, 2.7).

Every peer reduces for itself, and all must end with the same bits. So everything here is
elementwise, float32, on the CPU, one operation at a time and in one order: IEEE 754 then fixes
each rounding, whatever the processor, its vector width or the number of threads. A sum over
elements (a norm, a dot product) or a fused multiply-add (`add` with `alpha`, `addcmul`, `lerp`)
would not have that property and must not appear. Scalars are rounded to float32 first.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState
from dipaco.config import OuterConfig
from dipaco.topology import PathID


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contribution:
    """The outer gradient (old minus new) of one module by one peer, who trained it for `tokens`."""

    path: PathID
    tokens: int
    gradient: Tensor


def contribution_weights(
    paths_and_tokens: Sequence[tuple[PathID, int]], shard_tokens: Mapping[PathID, int]
) -> list[float]:
    """The weight of each contribution to one module, in the order given (paper Eq. 2 and 3).

    A path's weight is its shard's share of the tokens, among the paths that contribute; the
    peers of one path split it by the tokens they trained. Weights sum to 1 but for the rounding
    of each to float32. ValueError if there is a path without a shard, or a contribution or shard
    without tokens.
    """
    trained: dict[PathID, int] = {}
    for path, tokens in paths_and_tokens:
        if tokens <= 0 or shard_tokens.get(path, 0) <= 0:
            raise ValueError(f"a contribution of path {path} has no tokens or no shard")
        trained[path] = trained.get(path, 0) + tokens
    total = sum(shard_tokens[path] for path in trained)
    return [
        as_float32(Fraction(shard_tokens[path] * tokens, total * trained[path]))
        for path, tokens in paths_and_tokens
    ]


class OuterReduction:
    """The weighted average of outer gradients, one at a time; the order is part of the result."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, weight: float, gradient: Tensor) -> None:
        """Add one gradient. ValueError unless it is 1-D float32, as long as the ones before."""
        if gradient.dim() != 1 or gradient.dtype != torch.float32:
            raise ValueError("an outer gradient is a 1-D float32 vector")
        weighted = gradient * as_float32(weight)
        if self._sum is None:
            self._sum = weighted
        elif self._sum.shape != weighted.shape:
            raise ValueError("outer gradients of one module differ in length")
        else:
            self._sum += weighted

    @property
    def gradient(self) -> Tensor:
        """The average so far; ValueError if nothing was added."""
        if self._sum is None:
            raise ValueError("nothing to reduce")
        return self._sum


def rescale_factor(rescale: str, num_paths: int) -> float:
    """What the averaged gradient is multiplied by (paper 2.7): 1, or the root of `num_paths`."""
    return as_float32(math.sqrt(num_paths)) if rescale == "sqrt" else 1.0


def outer_step(state: ModuleState, gradient: Tensor, config: OuterConfig) -> ModuleState:
    """One Nesterov step, as torch.optim.SGD(nesterov=True) defines it.

    m' = mu m + g;  theta' = theta - lr (g + mu m'). The old state is left as it was.
    """
    lr = as_float32(config.learning_rate)
    mu = as_float32(config.momentum)
    momentum = state.momentum * mu
    momentum += gradient
    step = momentum * mu
    step += gradient
    step *= lr
    return ModuleState(parameters=state.parameters - step, momentum=momentum)


def apply_contributions(
    state: ModuleState,
    contributions: Iterable[tuple[float, Tensor]],
    num_paths: int,
    config: OuterConfig,
) -> ModuleState:
    """The next version of a module: reduce (weight, gradient) pairs in the order given, and step.

    `num_paths` is the number of distinct paths among the contributions. ValueError if there are
    no contributions, or if they do not fit the state.
    """
    reduction = OuterReduction()
    for weight, gradient in contributions:
        reduction.add(weight, gradient)
    gradient = reduction.gradient
    if gradient.shape != state.parameters.shape:
        raise ValueError("an outer gradient and its module differ in length")
    gradient *= rescale_factor(config.rescale, num_paths)
    return outer_step(state, gradient, config)


def as_float32(value: float | Fraction) -> float:
    """The value rounded to float32, as a Python float."""
    rounded: float = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    return rounded
