"""The outer step of a module: weights, average, rescaling, Nesterov (paper 2.6, 2.7).

Every peer reduces for itself, and all must end with the same bits. So everything here is
elementwise, float32, on the CPU, one operation at a time and in one order: IEEE 754 then fixes
each rounding, whatever the processor, its vector width or the number of threads. A library's sum
over elements (a norm, a dot product) or a fused multiply-add (`add` with `alpha`, `addcmul`,
`lerp`) would not have that property and must not decide a value; where a norm does, `exact_norm`
adds up in an order of its own. Scalars are rounded to float32 first.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState
from dipaco.config import OuterConfig, Rescale
from dipaco.topology import PathID

_NORM_LANES = 2**16
_LEAST_NORM = 1e-20  # a shorter vector has no direction worth a float32


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
    """The weighted average of outer gradients, one at a time; the order is part of the result.

    With `rescale` = "rda" norms and directions are averaged separately (Decoupled DiLoCo, arXiv
    2604.21428): the result points where the weighted directions do and is as long as the weighted
    average of the norms, however much the gradients agree.
    """

    def __init__(self, rescale: Rescale) -> None:
        self._rescale = rescale
        self._sum: Tensor | None = None
        self._mean_norm = 0.0

    def add(self, weight: float, gradient: Tensor) -> None:
        """Add one gradient. ValueError unless it is 1-D float32, as long as the ones before."""
        if gradient.dim() != 1 or gradient.dtype != torch.float32:
            raise ValueError("an outer gradient is a 1-D float32 vector")
        if self._sum is not None and self._sum.shape != gradient.shape:
            raise ValueError("outer gradients of one module differ in length")
        factor = weight
        if self._rescale == "rda":
            norm = exact_norm(gradient)
            factor = weight / norm if norm > _LEAST_NORM else 0.0
        else:
            norm = float(torch.linalg.vector_norm(gradient))
        self._mean_norm += weight * norm
        weighted = gradient * as_float32(factor)
        if self._sum is None:
            self._sum = weighted
        else:
            self._sum += weighted

    def finish(self, num_paths: int) -> "Reduced":
        """The average, rescaled for contributions of `num_paths` paths; ValueError without any."""
        if self._sum is None:
            raise ValueError("nothing to reduce")
        gradient, self._sum = self._sum, None
        norm = float(torch.linalg.vector_norm(gradient))
        if self._rescale == "rda":
            ratio = norm
            exact = exact_norm(gradient)
            gradient *= as_float32(self._mean_norm / exact) if exact > _LEAST_NORM else 0.0
        else:
            ratio = norm / self._mean_norm if self._mean_norm else 0.0
            gradient *= rescale_factor(self._rescale, num_paths)
        return Reduced(gradient=gradient, norm_ratio=ratio)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reduced:
    """The outer gradient of a module, and how well its contributions agreed.

    `norm_ratio` is the norm of their average over the average of their norms, before rescaling:
    1 if all point the same way, 1 / sqrt(n) if n of equal length are orthogonal. With "rda" it is
    that of the directions. For people to read; no value of the model depends on it.
    """

    gradient: Tensor
    norm_ratio: float


def exact_norm(vector: Tensor) -> float:
    """The Euclidean norm of a 1-D float32 vector, the same bits on every machine.

    Squares of float32 are exact in float64; they are added to fixed lanes one after another, and
    the lanes pairwise.
    """
    lanes = torch.zeros(_NORM_LANES, dtype=torch.float64)
    for part in torch.split(vector, _NORM_LANES):
        squares = part.double()
        squares *= squares
        lanes[: len(squares)] += squares
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return math.sqrt(lanes.item())


def rescale_factor(rescale: Rescale, num_paths: int) -> float:
    """What the averaged gradient is multiplied by (paper 2.7): 1, or the root of `num_paths`."""
    return as_float32(math.sqrt(num_paths)) if rescale == "sqrt" else 1.0


def outer_step(
    state: ModuleState, gradient: Tensor, num_paths: int, config: OuterConfig
) -> ModuleState:
    """One Nesterov step, as torch.optim.SGD(nesterov=True) defines it.

    m' = mu m + g;  theta' = theta - lr (g + mu m'). The old state is left as it was.
    """
    lr = as_float32(config.learning_rate_for(num_paths))
    mu = as_float32(config.momentum)
    momentum = state.momentum * mu
    momentum += gradient
    step = momentum * mu
    step += gradient
    step *= lr
    return ModuleState(parameters=state.parameters - step, momentum=momentum)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OuterUpdate:
    """The next version of a module, and how well its contributions agreed (see `Reduced`)."""

    state: ModuleState
    norm_ratio: float


def apply_contributions(
    state: ModuleState,
    contributions: Iterable[tuple[float, Tensor]],
    num_paths: int,
    config: OuterConfig,
) -> OuterUpdate:
    """The next version of a module: reduce (weight, gradient) pairs in the order given, and step.

    `num_paths` is the number of distinct paths among the contributions. ValueError if there are
    no contributions, or if they do not fit the state.
    """
    reduction = OuterReduction(config.rescale)
    for weight, gradient in contributions:
        reduction.add(weight, gradient)
    reduced = reduction.finish(num_paths)
    if reduced.gradient.shape != state.parameters.shape:
        raise ValueError("an outer gradient and its module differ in length")
    return OuterUpdate(
        state=outer_step(state, reduced.gradient, num_paths, config),
        norm_ratio=reduced.norm_ratio,
    )


def as_float32(value: float | Fraction) -> float:
    """The value rounded to float32, as a Python float."""
    rounded: float = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    return rounded
