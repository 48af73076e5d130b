"""What DiLoCo replaces: every module averages its gradients in every step (paper 4.5).

Each path's gradient is clipped as its own training would, and weighs what its outer gradient would:
by its shard's tokens.

All paths are in memory at once, their shared modules the very same tensors.
"""

from collections import Counter

import torch
import torch.nn.functional as F

from dipaco.batches import Batches
from dipaco.device import autocast
from dipaco.evaluate import IGNORED, targets_of
from dipaco.model import PathNet, parameter_shapes, write_module
from dipaco.optimizer import learning_rate
from dipaco.start import Start
from dipaco.topology import ModuleID


def train_synchronously(start: Start, num_steps: int, device: str) -> list[PathNet]:
    """The networks of all paths after `num_steps` common steps of one AdamW."""
    config, topology = start.config, start.topology
    shared: dict[tuple[ModuleID, str], torch.nn.Parameter] = {}
    nets = [_net_of(start, n, shared).to(device) for n in range(topology.num_paths)]
    batches = [
        Batches(
            start.shard(path).train,
            batch_sequences=config.inner.batch_sequences,
            seed=config.seed,
            path=path,
        )
        for path in topology.paths
    ]
    parameters = list(shared.values())
    decay = config.inner.weight_decay
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (config.inner.beta1, config.inner.beta2)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    shares = [start.shard_tokens[path] for path in topology.paths]
    totals: Counter[ModuleID] = Counter()
    for path, share in zip(topology.paths, shares, strict=True):
        totals.update(dict.fromkeys(topology.modules_of(path), share))
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                config.inner, position_steps=step, total_steps=num_steps, fresh_steps=step
            )
        means = {key: torch.zeros_like(parameter) for key, parameter in shared.items()}
        for net, source, share in zip(nets, batches, shares, strict=True):
            tokens = source.batch(step).to(device)
            targets = targets_of(tokens, prefix_tokens=1, pad=config.model.pad_token)
            with autocast(tokens.device):
                logits = net(tokens).float()
            F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            ).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.inner.gradient_clip_norm)
            for key, parameter in shared.items():
                if parameter.grad is not None:
                    means[key].add_(parameter.grad, alpha=share / totals[key[0]])
                    parameter.grad = None
        for key, parameter in shared.items():
            parameter.grad = means[key]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return nets


def _net_of(
    start: Start, number: int, shared: dict[tuple[ModuleID, str], torch.nn.Parameter]
) -> PathNet:
    topology = start.topology
    net = PathNet(start.config.model)
    for module in topology.modules_of(topology.path_at(number)):
        write_module(net, topology, module, start.module_state(module).parameters)
        for name in parameter_shapes(start.config.model, topology, module):
            parameter = shared.setdefault((module, name), net.get_parameter(name))
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, parameter)
    return net
