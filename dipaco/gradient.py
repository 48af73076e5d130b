"""Outer gradients that are read part by part, so that adding up many takes little memory."""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dipaco.codec import PART_VALUES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_NORM_LANES = 2**13


class Gradient(Protocol):
    """A 1-D float32 vector."""

    @property
    def num_values(self) -> int:
        """Its length."""

    @property
    def norm(self) -> float:
        """Its Euclidean norm, the same bits on every machine."""

    def part(self, start: int, stop: int, scratch: "Floats") -> "Floats":
        """Values `start` to `stop`, as `Codec.part` gives them."""

    def add_part(
        self, start: int, stop: int, factor: np.float32, total: "Floats", scratch: "Floats"
    ) -> None:
        """Add values `start` to `stop` times `factor` to `total`, as `Codec.add_part` does."""


class TensorGradient:
    """One in memory. ValueError unless the tensor is 1-D float32."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dim() != 1 or tensor.dtype != torch.float32:
            raise ValueError("an outer gradient is a 1-D float32 vector")
        self._values: Floats = tensor.detach().cpu().numpy()

    @property
    def num_values(self) -> int:
        """See `Gradient`."""
        return len(self._values)

    @cached_property
    def norm(self) -> float:
        """See `Gradient`."""
        return exact_norm(self)

    def part(self, start: int, stop: int, scratch: "Floats") -> "Floats":
        """See `Gradient`."""
        return self._values[start:stop]

    def add_part(
        self, start: int, stop: int, factor: np.float32, total: "Floats", scratch: "Floats"
    ) -> None:
        """See `Gradient`."""
        from dipaco import kernels

        kernels.add_multiplied(self._values[start:stop], factor, total)


class NormSum:
    """Adds up squares for a Euclidean norm that has the same bits on every machine.

    Squares of float32 are exact in float64; they are added to fixed lanes one after another, and
    the lanes pairwise.
    """

    def __init__(self) -> None:
        self._lanes = np.zeros(_NORM_LANES)

    def add(self, values: "Floats") -> None:
        """The next values; all but the last must be a multiple of `_NORM_LANES` (a part is)."""
        from dipaco import kernels

        kernels.add_squares(values, self._lanes)

    def finish(self) -> float:
        """The norm; not finite if a value was not."""
        lanes = self._lanes
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        return math.sqrt(lanes.item())


def exact_norm(gradient: Gradient) -> float:
    """The Euclidean norm, the same bits on every machine; not finite if a value is not."""
    total = NormSum()
    scratch = np.empty(PART_VALUES, np.float32)
    for start in range(0, gradient.num_values, PART_VALUES):
        stop = min(start + PART_VALUES, gradient.num_values)
        total.add(gradient.part(start, stop, scratch))
    with np.errstate(invalid="ignore", over="ignore"):
        return total.finish()
