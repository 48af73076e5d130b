"""Several small paths on one device at once.

A small network leaves a GPU waiting for the next of many short operations. Here the networks of
several paths run as one, whose parameters have one more dimension: P paths. What differs between
paths stays with their trainers: batches, clipping, learning rate, the optimizer's state.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dipaco.device import autocast, send
from dipaco.inner import PathTrainer, counted_positions
from dipaco.model import PathNet


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
        self._body = _Body(trainers[0].net)
        self._stacked: dict[str, Tensor] = {}
        for name in trainers[0].net.state_dict():
            parameters = [trainer.net.get_parameter(name) for trainer in trainers]
            stacked = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, stacked, strict=True):
                parameter.data = part  # a view: what an optimizer writes is in `stacked` too
            self._stacked[name] = stacked.requires_grad_()

    def train_step(self, position_steps: int) -> Tensor:
        """One inner step of each trainer; returns their losses [P], as `PathTrainer` does."""
        tokens, targets = zip(*(trainer.next_batch() for trainer in self._trainers), strict=True)
        tokens_PBT = send(torch.stack(tokens), self._device)
        with warnings.catch_warnings():
            # On a CPU, attention has no form for many networks: it runs once for each of them.
            warnings.filterwarnings("ignore", "There is a performance drop")
            hidden_PBTD: Tensor = vmap(self._hidden)(self._stacked, tokens_PBT)
        # The heads one after another: the logits of all paths at once would fill the memory.
        counted, losses, gradients = [], [], []
        for trainer, hidden_BTD, targets_BT in zip(
            self._trainers, hidden_PBTD, targets, strict=True
        ):
            hidden_ND, targets_N = counted_positions(hidden_BTD, targets_BT)
            loss, gradient_ND = trainer.backward_head(hidden_ND.detach(), targets_N)
            counted.append(hidden_ND)
            losses.append(loss)
            gradients.append(gradient_ND)
        torch.autograd.backward(counted, gradients)
        for name, stacked in self._stacked.items():
            if stacked.grad is None:
                continue  # of the head alone
            for trainer, gradient in zip(self._trainers, stacked.grad, strict=True):
                parameter = trainer.net.get_parameter(name)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            stacked.grad = None
        for trainer in self._trainers:
            trainer.update(position_steps)
        return torch.stack(losses)

    def _hidden(self, parameters: Mapping[str, Tensor], tokens_BT: Tensor) -> Tensor:
        """Of one path; the trainers' networks are alike but for their parameters."""
        named = {f"net.{name}": value for name, value in parameters.items()}
        with autocast(self._device):
            hidden_BTD: Tensor = functional_call(self._body, named, (tokens_BT,))
        return hidden_BTD


class _Body(nn.Module):
    """A network without its head."""

    def __init__(self, net: PathNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.net.hidden(tokens_BT)
