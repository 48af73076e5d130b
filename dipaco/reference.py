"""DiPaCo on one machine: the whole algorithm in one loop (paper Algorithm 1). Read this first.

The swarm does the same with the same functions, each path on another peer, and must end with
the same bytes: `train` is the oracle that tests compare it with. Bit for bit that holds for
float32 on the CPU, with the same number of torch threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState, state_digest
from dipaco.compression import compress_with_feedback, decode
from dipaco.evaluate import NOTHING, Evaluation
from dipaco.inner import PathTrainer
from dipaco.model import read_module
from dipaco.outer import Contribution, apply_contributions, contribution_weights
from dipaco.shards import union_of
from dipaco.start import Start, single_path
from dipaco.topology import ModuleID, PathID, Topology

Evaluations = dict[PathID, Evaluation]
"""Each path, scored on the validation part of its own shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """What a round left behind: the last training loss of each path, and its evaluation."""

    round: int
    losses: dict[PathID, float]
    evaluations: Evaluations


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceResult:
    """The last version of every module, its digest, and evaluations before and after."""

    states: dict[ModuleID, ModuleState]
    digests: dict[ModuleID, str]
    at_start: Evaluations
    at_end: Evaluations


def train(
    start: Start,
    *,
    num_rounds: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[PathID, int], None] = lambda path, position: None,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> ReferenceResult:
    """Train all paths for `num_rounds` rounds from the start."""
    config, topology = start.config, start.topology
    inner_steps, wire_format = config.rounds.inner_steps, config.outer.wire_format
    states = {module: start.module_state(module) for module in topology.modules}
    trainers = {
        path: PathTrainer(config, topology, path, start.shard(path), device=device)
        for path in topology.paths
    }
    residuals: dict[tuple[PathID, ModuleID], Tensor | None] = {}
    at_start = evaluations = _evaluate(trainers, states)

    for round_ in range(num_rounds):
        contributions: dict[ModuleID, list[Contribution]] = {m: [] for m in topology.modules}
        losses = {}

        # Each path trains on its own shard, from the modules as they are now.
        for path, trainer in trainers.items():
            for module in trainer.modules:
                trainer.write_module(module, states[module].parameters)
            for step in range(inner_steps):
                position = round_ * inner_steps + step
                loss = trainer.train_step(position)
                on_step(path, position)
            losses[path] = loss.item()
            # ... and contributes, to each of its modules, how far that moved, old minus new.
            for module in trainer.modules:
                gradient = states[module].parameters - trainer.read_module(module)
                raw, residuals[path, module] = compress_with_feedback(
                    gradient, residuals.get((path, module)), wire_format
                )
                gradient = decode(raw, wire_format, num_parameters=gradient.numel())
                tokens = inner_steps * trainer.tokens_per_step
                contributions[module].append(
                    Contribution(path=path, tokens=tokens, gradient=gradient)
                )

        # Each module takes one outer step, with the contributions in the order of the paths.
        for module, parts in contributions.items():
            weights = contribution_weights(
                [(part.path, part.tokens) for part in parts], start.shard_tokens
            )
            weighted = zip(weights, (part.gradient for part in parts), strict=True)
            states[module] = apply_contributions(states[module], weighted, len(parts), config.outer)

        evaluations = _evaluate(trainers, states)
        on_round(RoundReport(round=round_, losses=losses, evaluations=evaluations))

    return ReferenceResult(
        states=states,
        digests={module: state_digest(state) for module, state in states.items()},
        at_start=at_start,
        at_end=evaluations,
    )


def train_dense(
    start: Start,
    num_steps: int,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda step: None,
) -> Evaluations:
    """What a DiPaCo is compared with: one network of a path's size on the union of the shards.

    Plain AdamW from the same start, with a path's batch and schedule, for `num_steps` steps.
    Returns its evaluations on the same validation sequences.
    """
    config = single_path(start.config, num_steps)
    topology = Topology.of(config)
    shards = {path: start.shard(path) for path in start.topology.paths}
    trainer = PathTrainer(config, topology, topology.paths[0], union_of(shards), device=device)
    net = start.net()
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    for step in range(num_steps):
        trainer.train_step(step)
        on_step(step)
    num_rows = start.config.rounds.eval_sequences
    return {path: trainer.evaluate_rows(shard.valid[:num_rows]) for path, shard in shards.items()}


def total(evaluations: Evaluations) -> Evaluation:
    """The whole model: every sequence through the path that the router gives it."""
    return sum(evaluations.values(), NOTHING)


def _evaluate(
    trainers: dict[PathID, PathTrainer], states: dict[ModuleID, ModuleState]
) -> Evaluations:
    evaluations = {}
    for path, trainer in trainers.items():
        for module in trainer.modules:
            trainer.write_module(module, states[module].parameters)
        evaluations[path] = trainer.evaluate(trainer.config.rounds.eval_sequences)
    return evaluations
