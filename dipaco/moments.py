"""AdamW's state of a path in 8 bits a value: what a path's next peer begins with.

The running means of the gradients and of their squares, the latter as roots, since those have half
as many decades and are what a step is divided by. Both in the 8-bit blocks of `blocks`. What is
lost costs no loss that can be measured; a new AdamW does (`python -m benchmarks.handover`).

Nothing certifies these bytes, so a reader believes nothing of them: of any it makes moments that
gradients under this run's clipping could have left. The worst of those make some dozen steps too
long, by a small factor, or too short; and what a path's peer makes of its own steps is bounded for
everyone else by the clipping of outer gradients.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dipaco.blocks import Int8Codec
from dipaco.codec import PART_VALUES
from dipaco.config import InnerConfig
from dipaco.errors import BadBytes
from dipaco.tensors import Layout, decode_tensors, encode_tensors, encoded_bytes, is_finite

MAX_STEPS = 2**24  # beyond this, float32 does not count steps one by one
SQUARES_SLACK = 2.0  # rounding may add that much to the sum of squares

_CODEC = Int8Codec()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Of all of a path's parameters, one after another: 1-D, float32, on the CPU."""

    num_steps: int
    mean: Tensor
    mean_square: Tensor


def encode_moments(moments: Moments) -> bytes:
    """As safetensors; BadBytes if training has left values that are not finite."""
    if not (is_finite(moments.mean) and is_finite(moments.mean_square)):
        raise BadBytes("an optimizer's state is not finite")
    parts = {"mean": moments.mean, "root": moments.mean_square.sqrt()}
    tensors = {"num_steps": torch.tensor(moments.num_steps)}
    for name, vector in parts.items():
        tensors |= {f"{name}.{key}": part for key, part in _CODEC.encode(vector).items()}
    return encode_tensors(tensors)


def moments_bytes(num_parameters: int) -> int:
    """Exact length of encoded moments."""
    return encoded_bytes(_layout(num_parameters))


def decode_moments(raw: bytes, *, num_parameters: int, config: InnerConfig) -> Moments:
    """What `encode_moments` of a peer that trains by `config` gives; BadBytes on anything else."""
    try:
        tensors = decode_tensors(raw, _layout(num_parameters))
    except ValueError as error:
        raise BadBytes(f"not an optimizer's state: {error}") from error
    num_steps = int(tensors["num_steps"])
    mean, root = (_values(tensors, name, num_parameters) for name in ("mean", "root"))
    if not 1 <= num_steps <= MAX_STEPS:
        raise BadBytes("not an optimizer's state: its number of steps is none")
    if not (is_finite(mean) and is_finite(root)):
        raise BadBytes("not an optimizer's state: a value is not finite")
    if num_parameters and float(root.min()) < 0.0:
        raise BadBytes("not an optimizer's state: a square is negative")
    # Clipped gradients are no longer than this, and so is what is averaged of them.
    if float(root.square().sum(dtype=torch.float64)) > SQUARES_SLACK * config.gradient_clip_norm**2:
        raise BadBytes("not an optimizer's state: no clipped gradients are that long")
    limit = root * greatest_ratio(config)
    mean = torch.minimum(torch.maximum(mean, -limit), limit)
    return Moments(num_steps=num_steps, mean=mean, mean_square=root.square_())


def greatest_ratio(config: InnerConfig) -> float:
    """How many times the root of their mean square the mean of any gradients can be.

    By Cauchy and Schwarz, for the two rates at which they are forgotten.
    """
    beta1, beta2 = config.beta1, config.beta2
    forgotten = 1.0 - beta1**2 / max(beta2, 1e-9)
    return (1.0 - beta1) / math.sqrt((1.0 - beta2) * max(forgotten, 0.01))


def _values(tensors: Mapping[str, Tensor], name: str, num_values: int) -> Tensor:
    bodies = {key: tensors[f"{name}.{key}"].view(torch.uint8).numpy().data
              for key in _CODEC.layout(num_values)}  # fmt: skip
    vector = np.empty(num_values, np.float32)
    scratch = np.empty(PART_VALUES, np.float32)
    for start in range(0, num_values, PART_VALUES):
        stop = min(start + PART_VALUES, num_values)
        vector[start:stop] = _CODEC.part(bodies, start, stop, scratch)
    return torch.from_numpy(vector)


def _layout(num_parameters: int) -> Layout:
    encoded = _CODEC.layout(num_parameters)
    parts = {f"{name}.{key}": of for name in ("mean", "root") for key, of in encoded.items()}
    return {"num_steps": (torch.int64, ()), **parts}
