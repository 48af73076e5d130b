"""What a DiPaCo is compared with: one network of a path's size on all of the training data."""

from collections.abc import Callable
from dataclasses import replace

import torch

from dipaco.config import RoundsConfig, RoutingConfig, RunConfig, TopologyConfig
from dipaco.inner import PathTrainer
from dipaco.model import read_module
from dipaco.rounds import Evaluations
from dipaco.sharding import Sharding
from dipaco.shards import Shard
from dipaco.start import Start
from dipaco.topology import Topology


def single_path(config: RunConfig, num_steps: int) -> RunConfig:
    """The run in which one path is the whole network: a dense model, for `num_steps` steps."""
    rounds = RoundsConfig(num_rounds=1, inner_steps=max(num_steps, 1), round_seconds=1.0)
    routing = RoutingConfig(prefix_tokens=config.routing.prefix_tokens)
    return replace(config, topology=TopologyConfig(levels=(1,)), rounds=rounds, routing=routing)


def train_dense(
    start: Start,
    num_steps: int,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda step: None,
) -> PathTrainer:
    """Take all the steps of a `dense_trainer`."""
    trainer = dense_trainer(start, num_steps, device=device)
    for step in range(num_steps):
        trainer.train_step(step)
        on_step(step)
    return trainer


def dense_trainer(
    start: Start, num_steps: int, *, device: torch.device | str = "cpu"
) -> PathTrainer:
    """Plain AdamW from the same start, with a path's batch and a schedule for `num_steps` steps.

    The start was trained on the same rows in the same order: this goes on with those after its own.
    """
    config = single_path(start.config, num_steps)
    topology = Topology.of(config)
    shard = Shard(path=topology.paths[0], train=start.rows("train"), valid=start.rows("valid"))
    trainer = PathTrainer(config, topology, shard.path, shard, device=device)
    net = start.net()
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    dense_start = start.config.dense_start
    if not dense_start.checkpoint:
        num_seen = dense_start.steps * dense_start.batch_sequences
        trainer.seek(-(-num_seen // config.inner.batch_sequences))
    return trainer


def evaluate_dense(sharding: Sharding, dense: PathTrainer) -> Evaluations:
    """The dense model on the sequences that each path is evaluated on."""
    num_rows = sharding.config.rounds.eval_sequences
    return {
        path: dense.evaluate_rows(sharding.shard(path).valid[:num_rows])
        for path in sharding.shard_tokens
    }
