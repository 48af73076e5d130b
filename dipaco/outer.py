"""The outer step of a module: weights, average, rescaling, Nesterov (paper 2.6, 2.7).

Every peer reduces for itself, and all must end with the same bits. So everything here is
elementwise, float32, on the CPU, one operation at a time and in one order: IEEE 754 then fixes
each rounding, whatever the processor, its vector width or the number of threads. A library's sum
over elements (a norm, a dot product) or a fused multiply-add (`add` with `alpha`, `addcmul`,
`lerp`) would not have that property and must not decide a value; where a norm does, it is added up
in an order of its own (`NormSum`). Scalars are rounded to float32 first.

One thread does it (`dipaco.kernels`), one part of the vector after another, each small enough for a
cache: that is as fast as the memory is, and leaves the other threads to training.
"""

import math
import statistics
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState, blank_state
from dipaco.codec import PART_VALUES
from dipaco.compression import EncodedGradient, encode
from dipaco.config import OuterConfig, Rescale
from dipaco.gradient import Gradient, NormSum, TensorGradient
from dipaco.tensors import new_vector
from dipaco.topology import PathID

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LEAST_NORM = 1e-20  # a shorter vector has no direction worth a float32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contribution:
    """The outer gradient (old minus new) of one module by one peer, who trained it for `tokens`."""

    path: PathID
    tokens: int
    gradient: Gradient


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


def clip_factors(norms: Sequence[float], clip_norm: float) -> list[float]:
    """What to multiply each contribution by, so that none is longer than `clip_norm` medians.

    The median is of the norms that are not 0, the upper one of an even number: of one or two
    contributions nobody can say which is too long. 0 switches clipping off.
    """
    lengths = [norm for norm in norms if norm > _LEAST_NORM]
    if not lengths or not clip_norm:
        return [1.0] * len(norms)
    limit = clip_norm * statistics.median_high(lengths)
    return [limit / norm if norm > limit else 1.0 for norm in norms]


def rescale_factor(rescale: Rescale, num_paths: int) -> float:
    """What the averaged gradient is multiplied by (paper 2.7): 1, or the root of `num_paths`."""
    return as_float32(math.sqrt(num_paths)) if rescale == "sqrt" else 1.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OuterUpdate:
    """The next version of a module.

    `encoded` is the state as bytes; both share their memory. `norm_ratio` is the norm of the
    average of the contributions over the average of their norms, before rescaling: 1 if all point
    the same way, 1 / sqrt(n) if n of equal length are orthogonal; with "rda" it is that of the
    directions. It and `num_clipped` are for people to read; no value of the model depends on them.
    """

    state: ModuleState
    encoded: memoryview
    norm_ratio: float
    num_clipped: int


def apply_contributions(
    state: ModuleState,
    contributions: Iterable[tuple[float, Tensor | Gradient]],
    num_paths: int,
    config: OuterConfig,
) -> OuterUpdate:
    """The next version of a module: clip, average, rescale, and take the outer step.

    `contributions` are (weight, outer gradient) pairs in the order in which they are added up,
    which is part of the result; `num_paths` is the number of distinct paths among them, and
    `config` is that of the module (`OuterConfig.of_module`). Besides what the contributions take
    and the new state (8 bytes per parameter), this needs two megabytes.
    ValueError if there are no contributions, or if they do not fit the state.

    With `rescale` = "rda" norms and directions are averaged separately (Decoupled DiLoCo, arXiv
    2604.21428): the result points where the weighted directions do and is as long as the weighted
    average of the norms, however much the gradients agree. There that is done for each tensor, and
    embeddings are averaged plainly; here it is done for the module as a whole.
    """
    weights, gradients = _fitting(contributions)
    if gradients[0].num_values != state.num_parameters:
        raise ValueError("an outer gradient and its module differ in length")
    norms = [gradient.norm for gradient in gradients]
    clips = clip_factors(norms, config.clip_norm)
    mean_norm = sum(w * norm * clip for w, norm, clip in zip(weights, norms, clips, strict=True))
    assert not config.learning_rate_by_paths, "the module's own settings, not the run's"
    step = _OuterStep(state, config)
    if config.rescale == "rda":
        factors = [w / n if n > _LEAST_NORM else 0.0 for w, n in zip(weights, norms, strict=True)]
        norm_ratio = length = _add_directions(gradients, factors, step)
        scale = as_float32(mean_norm / length) if length > _LEAST_NORM else 0.0
        for part in _parts(state.num_parameters):
            step.take(part, step.momentum[part] * np.float32(scale))
    else:
        factors = [weight * clip for weight, clip in zip(weights, clips, strict=True)]
        scale = rescale_factor(config.rescale, num_paths)
        norm = NormSum()
        for part, average in _sums(gradients, factors):
            norm.add(average)
            if scale != 1.0:
                average *= np.float32(scale)
            step.take(part, average)
        norm_ratio = norm.finish() / mean_norm if mean_norm else 0.0
    return OuterUpdate(
        state=step.after,
        encoded=step.encoded,
        norm_ratio=norm_ratio,
        num_clipped=sum(clip < 1.0 for clip in clips),
    )


def average(
    contributions: Sequence[tuple[float, Tensor | Gradient]], *, clip_norm: float
) -> Tensor:
    """The weighted sum of (weight, outer gradient) pairs, clipped as in an outer step.

    ValueError if there are none, or if their lengths differ.
    """
    weights, gradients = _fitting(contributions)
    clips = clip_factors([gradient.norm for gradient in gradients], clip_norm)
    factors = [weight * clip for weight, clip in zip(weights, clips, strict=True)]
    result = new_vector(gradients[0].num_values)
    values = result.numpy()
    for part, total in _sums(gradients, factors):
        values[part] = total
    return result


def _fitting(
    contributions: Iterable[tuple[float, Tensor | Gradient]],
) -> tuple[list[float], list[Gradient]]:
    """Weights and gradients; ValueError if there are none, or if their lengths differ."""
    pairs = list(contributions)
    gradients = [
        TensorGradient(gradient) if isinstance(gradient, Tensor) else gradient
        for _, gradient in pairs
    ]
    if not pairs:
        raise ValueError("nothing to reduce")
    if len({gradient.num_values for gradient in gradients}) > 1:
        raise ValueError("outer gradients of different length")
    return [weight for weight, _ in pairs], gradients


def _parts(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, PART_VALUES):
        yield slice(start, min(start + PART_VALUES, num_values))


def _sums(
    gradients: Sequence[Gradient], factors: Sequence[float]
) -> "Iterator[tuple[slice, Floats]]":
    """The sum of the gradients times their factors, part by part, in memory that is used again."""
    total, scratch = (np.empty(PART_VALUES, np.float32) for _ in range(2))
    rounded = [np.float32(as_float32(factor)) for factor in factors]
    for part in _parts(gradients[0].num_values):
        total[:] = 0.0
        for gradient, factor in zip(gradients, rounded, strict=True):
            gradient.add_part(part.start, part.stop, factor, total, scratch)
        yield part, total[: part.stop - part.start]


def _add_directions(
    gradients: Sequence[Gradient], factors: Sequence[float], step: "_OuterStep"
) -> float:
    """Put the sum where the new momentum will be, until its length, which is returned, is known."""
    norm = NormSum()
    for part, total in _sums(gradients, factors):
        step.momentum[part] = total
        norm.add(total)
    return norm.finish()


class _OuterStep:
    """One Nesterov step, part by part, into a new state; the old one is left as it was.

    As torch.optim.SGD(nesterov=True) defines it: m' = mu m + g;  theta' = theta - lr (g + mu m').
    """

    def __init__(self, state: ModuleState, config: OuterConfig) -> None:
        self.encoded, self.after = blank_state(state.num_parameters)
        self.momentum: Floats = self.after.momentum.numpy()
        self._parameters: Floats = self.after.parameters.numpy()
        self._old: Floats = state.parameters.numpy()
        self._old_momentum: Floats = state.momentum.numpy()
        rates = config.learning_rate, config.momentum
        self._rates = np.array([as_float32(rate) for rate in rates], np.float32)

    def take(self, part: slice, gradient: "Floats") -> None:
        """Every operation by itself, so that each is rounded once."""
        from dipaco import kernels

        kernels.nesterov(
            self._old[part],
            self._old_momentum[part],
            gradient,
            self._rates,
            self._parameters[part],
            self.momentum[part],
        )


def warm_up(config: OuterConfig) -> None:
    """Load and compile what the first round would have to, which takes seconds."""
    raw = encode(torch.zeros(1), config.wire_format)
    gradient = EncodedGradient(raw, config.wire_format, num_parameters=1)
    state = ModuleState.initial(torch.zeros(1))
    apply_contributions(state, [(0.5, gradient), (0.5, gradient)], 2, config.of_module(2))


def as_float32(value: float | Fraction) -> float:
    """The value rounded to float32, as a Python float."""
    rounded: float = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    return rounded
