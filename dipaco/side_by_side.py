"""Several small paths on one device at once.

A small network leaves a GPU waiting for the next of many short operations. Here the networks of
several paths run as one, whose parameters have one more dimension: P paths. What differs between
paths stays with their trainers: batches, clipping, learning rate, the optimizer's state.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from dipaco.evaluate import IGNORED
from dipaco.inner import PathTrainer, autocast, send


class SideBySide:
    """Steps of several trainers at once, on the device that they have in common.

    Between steps the trainers can be used as ever: the parameters they hold are the ones that
    train here. A trainer belongs to the last SideBySide it was given to.
    """

    def __init__(self, trainers: Sequence[PathTrainer]) -> None:
        if len({(trainer.device, trainer.config.fingerprint()) for trainer in trainers}) != 1:
            raise ValueError("trainers of one run on one device can run side by side")
        self._trainers = trainers
        self._device = trainers[0].device
        self._stacked: dict[str, Tensor] = {}
        for name in trainers[0].net.state_dict():
            parameters = [trainer.net.get_parameter(name) for trainer in trainers]
            stacked = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, stacked, strict=True):
                parameter.data = part  # a view: what an optimizer writes is in `stacked` too
            self._stacked[name] = stacked.requires_grad_()

    def train_step(self, position_steps: int) -> Tensor:
        """One inner step of each trainer; returns their losses [P], as `PathTrainer` does."""
        batches = [trainer.next_batch() for trainer in self._trainers]
        tokens_PBT, targets_PBT = (
            send(torch.stack(parts), self._device) for parts in zip(*batches, strict=True)
        )
        with warnings.catch_warnings():
            # On a CPU, attention has no form for many networks: it runs once for each of them.
            warnings.filterwarnings("ignore", "There is a performance drop")
            losses_P: Tensor = vmap(self._loss)(self._stacked, tokens_PBT, targets_PBT)
        losses_P.sum().backward()  # type: ignore[no-untyped-call]
        for name, stacked in self._stacked.items():
            assert stacked.grad is not None
            for trainer, gradient in zip(self._trainers, stacked.grad, strict=True):
                trainer.net.get_parameter(name).grad = gradient
            stacked.grad = None
        for trainer in self._trainers:
            trainer.update(position_steps)
        return losses_P.detach()

    def _loss(
        self, parameters: Mapping[str, Tensor], tokens_BT: Tensor, targets_BT: Tensor
    ) -> Tensor:
        """Mean loss of one path; the trainers' networks are alike but for their parameters."""
        with autocast(self._device):
            logits_BTV = functional_call(self._trainers[0].net, dict(parameters), (tokens_BT,))
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED
        )
