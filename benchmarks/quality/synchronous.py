"""What DiLoCo replaces: every module averages its gradients in every step (paper 4.5).

All paths are in memory at once, their shared modules the very same tensors.
"""

import torch
import torch.nn.functional as F

from dipaco.evaluate import IGNORED, targets_of
from dipaco.inner import Batches, learning_rate
from dipaco.model import PathNet, parameter_shapes, write_module
from dipaco.start import Start
from dipaco.topology import ModuleID


def train_synchronously(start: Start, num_steps: int, device: str) -> list[PathNet]:
    """The networks of all paths after `num_steps` common steps of one AdamW."""
    on_gpu = torch.device(device).type == "cuda"
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
    counts = {key: topology.num_paths_through(key[0]) for key in shared}
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                config.inner, position_steps=step, total_steps=num_steps, fresh_steps=step
            )
        for net, source in zip(nets, batches, strict=True):
            tokens = source.batch(step).to(device)
            targets = targets_of(tokens, prefix_tokens=1, pad=config.model.pad_token)
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                logits = net(tokens).float()
            F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            ).backward()
        for key, parameter in shared.items():
            assert parameter.grad is not None
            parameter.grad /= counts[key]
        torch.nn.utils.clip_grad_norm_(parameters, config.inner.gradient_clip_norm)
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
