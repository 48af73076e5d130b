"""The inner optimizer: which one, its learning rate, and what is kept of it on disk."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dipaco.config import InnerConfig
from dipaco.imports import bitsandbytes
from dipaco.moments import Moments
from dipaco.tensors import decode_tensors, layout_of, split_tensors

OptimizerName = Literal["adamw", "adamw8bit"]

_IDENTITY = "identity"


def learning_rate(
    config: InnerConfig, *, position_steps: int, total_steps: int, fresh_steps: int
) -> float:
    """Learning rate of one inner step: cosine over the run, warm-up over the optimizer's life.

    `position_steps` is where the run is (version x inner_steps + step within the round), the
    same for every peer; `fresh_steps` counts the steps since this optimizer had no state, so
    that a peer that arrives late, or takes another path, warms up too.
    """
    warmup = min(1.0, (fresh_steps + 1) / (config.warmup_steps + 1))
    progress = min(1.0, position_steps / total_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    final = config.final_learning_rate_fraction
    return config.learning_rate * warmup * (final + (1.0 - final) * cosine)


def new_optimizer(
    net: nn.Module, name: OptimizerName, config: InnerConfig
) -> torch.optim.Optimizer:
    """AdamW without weight decay on the norms."""
    parameters = list(net.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    if name == "adamw8bit":
        optimizer: torch.optim.Optimizer = bitsandbytes().optim.AdamW8bit(
            groups, lr=0.0, betas=betas
        )
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    identity: str,
    num_steps: int,
) -> dict[str, Tensor]:
    """An optimizer's state by `parameter number.key`, on the CPU; counts become int64 scalars.

    `identity` begins with the optimizer's name, and says what the state is of.
    """
    tensors = {
        _IDENTITY: torch.frombuffer(bytearray(identity.encode()), dtype=torch.uint8),
        "num_steps": torch.tensor(num_steps),
    }
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{number}.{key}"] = torch.as_tensor(value).cpu()
    return tensors


def optimizer_state(
    raw: bytes, parameters: Sequence[nn.Parameter], *, identity: str
) -> tuple[int, list[dict[str, Any]]]:
    """The inverse of `optimizer_tensors`: steps, and the state of each parameter, on its device.

    ValueError or LookupError if it is damaged, or not of this identity and these parameters.
    """
    tensors = decode_tensors(raw, layout_of(raw))
    if bytes(tensors.pop(_IDENTITY).numpy()) != identity.encode():
        raise ValueError("the optimizer's state is of another run, path or optimizer")
    num_steps = int(tensors.pop("num_steps"))
    return num_steps, _by_parameter(tensors, parameters, identity.partition(" ")[0])


def _by_parameter(
    tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], name: str
) -> list[dict[str, Any]]:
    state: list[dict[str, Any]] = [{} for _ in parameters]
    for full_name, tensor in tensors.items():
        number, key = full_name.split(".")
        is_count = tensor.dtype == torch.int64
        on_device = tensor.to(parameters[int(number)].device)
        state[int(number)][key] = int(tensor) if is_count else on_device
    keys = ("exp_avg", "exp_avg_sq") if name == "adamw" else ("state1", "state2")
    for parameter, entries in zip(parameters, state, strict=True):
        if "step" not in entries or any(entries[key].shape != parameter.shape for key in keys):
            raise ValueError("the optimizer's state is of another network")
    return state


def saved_moments(file: Path) -> Moments | None:
    """What a trainer's `save_optimizer` left in a file, for `take_over` of another peer's.

    None if that is nothing, damaged, or not AdamW's 32-bit state.
    """
    try:
        raw = np.memmap(file, dtype=np.uint8, mode="r").data
        bodies = split_tensors(raw, layout_of(raw))
        if not bytes(bodies[_IDENTITY]).startswith(b"adamw "):
            return None
        num_parameters = sum(name.endswith(".exp_avg") for name in bodies)
        mean, mean_square = (
            np.concatenate(
                [np.frombuffer(bodies[f"{n}.{key}"], np.float32) for n in range(num_parameters)]
            )
            for key in ("exp_avg", "exp_avg_sq")
        )
        [num_steps] = np.frombuffer(bodies["num_steps"], np.int64)
    except (OSError, ValueError, LookupError):
        return None
    return Moments(
        num_steps=int(num_steps),
        mean=torch.from_numpy(mean),
        mean_square=torch.from_numpy(mean_square),
    )
