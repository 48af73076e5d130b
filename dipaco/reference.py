"""DiPaCo on one machine: the whole algorithm in one loop (paper Algorithm 1). Read this first.

The swarm does the same with the same functions, each path on another peer, and must end with
the same bytes: `train` is the oracle that tests compare it with. Bit for bit that holds for
float32 on the CPU, with the same number of torch threads.

One path is in memory at a time, or a few side by side, besides the modules. All else is on disk,
a complete round at a time, so that an interrupted training loses at most the round it was in.
"""

# ruff: noqa: N806 - tensors carry their shape in their name: N sequences, P paths

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from dipaco.checkpoint import ModuleState, state_digest
from dipaco.compression import EncodedGradient, compress_with_feedback
from dipaco.config import RunConfig
from dipaco.early_stopping import keep_if_best
from dipaco.errors import BadBytes, ConfigError
from dipaco.evaluate import Evaluation
from dipaco.inner import PathTrainer
from dipaco.model import num_parameters
from dipaco.outer import Contribution, apply_contributions, contribution_weights
from dipaco.rounds import (
    DAMAGED_HINT,
    Evaluations,
    RoundFiles,
    RoundReport,
    delete_older_rounds,
    latest_round,
    next_round,
)
from dipaco.sharding import Sharding, reshard_corpus
from dipaco.shards import Shard
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID, Topology

States = dict[ModuleID, ModuleState]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceResult:
    """The last version of every module, its digest, and evaluations before and after.

    `sharding` is the one of the last round, on whose validation rows both are: of every path, by
    the first or the last versions, whether or not it had its turn in that round.
    """

    states: States
    digests: dict[ModuleID, str]
    sharding: Sharding
    at_start: Evaluations
    at_end: Evaluations


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the loop can do besides the algorithm of the configuration.

    `replicas` peers train each path, each with batches of its own: with a single path this is
    DiLoCo. `side_by_side` of them are in memory, and train at once where the device is a GPU.
    `compiled` makes steps faster and rounds otherwise. With `early_stopping` each path is also kept
    as it was when it did best on its own validation rows (paper 2.7); a training that has once
    begun with that goes on with it, so that what was kept is never out of date.
    """

    replicas: int = 1
    side_by_side: int = 1
    compiled: bool = False
    early_stopping: bool = False


def train(  # noqa: PLR0913 - what to train, then what to do meanwhile
    start: Start,
    directory: Path,
    *,
    num_rounds: int,
    device: torch.device | str = "cpu",
    options: Options | None = None,
    on_step: Callable[[PathID, int], None] = lambda path, position: None,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> ReferenceResult:
    """Train until `num_rounds` rounds are done, from the start or the last round in `directory`."""
    training = _Training(start, directory, device, options or Options(), on_step)
    delete_older_rounds(directory)
    latest = latest_round(directory, start.config) or training.begin()
    training.check(latest, num_rounds)
    states = {module: latest.state(module) for module in start.topology.modules}
    reports = latest.reports()

    for round_ in range(latest.number, num_rounds):
        with next_round(directory, start.config) as files:
            sharding = training.sharding(round_, states)

            # Each path trains on its own shard, from the modules as they are now, and contributes
            # to each of its modules how far that moved. No module moves until all have trained.
            paths = paths_of_round(start.config, start.topology, round_)
            trained = training.train(paths, round_, sharding, states, files)
            losses: dict[PathID, list[float]] = {}
            for turn in trained:
                losses.setdefault(turn.path, []).append(turn.loss)

            # Each module takes one outer step, with the contributions in the order of the paths.
            norm_ratios = {}
            for module in start.topology.modules:
                parts = training.contributions(module, trained, files)
                if not parts:
                    continue  # none of its paths had its turn
                weights = contribution_weights(
                    [(part.path, part.tokens) for part in parts], sharding.shard_tokens
                )
                weighted = zip(weights, (part.gradient for part in parts), strict=True)
                num_paths = len({part.path for part in parts})
                outer = start.config.outer.of_module(start.topology.num_paths_through(module))
                update = apply_contributions(states[module], weighted, num_paths, outer)
                states[module], norm_ratios[module] = update.state, update.norm_ratio
                files.write_state(module, update.state)

            # Each path that trained is scored on its shard's validation part, by the new modules.
            evaluations = dict(reports[-1].evaluations)
            for path in paths:
                evaluations[path] = training.evaluate(path, sharding, states, files)
            report = RoundReport(
                round=round_ + 1,
                losses={path: fmean(of_replicas) for path, of_replicas in losses.items()},
                evaluations=evaluations,
                norm_ratios=norm_ratios,
            )
            reports.append(report)
            files.write_reports(reports)
        on_round(report)

    sharding = training.sharding(max(0, num_rounds - 1), states)
    at_start, at_end = reports[0].evaluations, dict(reports[-1].evaluations)
    if sharding != start.sharding:  # what was scored then were the rows of another shard
        at_start = training.score_start(sharding)
    if reports[-1].round:  # who had no turn in the last round was scored by older modules
        for path in start.topology.paths:
            if path not in reports[-1].losses:
                at_end[path] = training.score(path, sharding, states)
    return ReferenceResult(
        states=states,
        digests={module: state_digest(state) for module, state in states.items()},
        sharding=sharding,
        at_start=at_start,
        at_end=at_end,
    )


def paths_of_round(config: RunConfig, topology: Topology, round_: int) -> list[PathID]:
    """The paths that train in a round, sorted: all, or a part, so that each gets its turn.

    Every path trains once before any trains twice, in an order that follows from the seed
    (paper 2.6.2 proposes to sample paths where there are too many).
    """
    count = config.rounds.paths_per_round or topology.num_paths
    num_groups = _num_groups(config, topology)
    epoch, group = divmod(round_, num_groups)
    if num_groups == 1:
        return list(topology.paths)
    order = np.random.default_rng((config.seed, epoch)).permutation(topology.num_paths)
    chosen = sorted(order[group * count : (group + 1) * count])
    return [topology.path_at(int(number)) for number in chosen]


def max_turns(config: RunConfig, topology: Topology) -> int:
    """In how many rounds of a run a path trains; one that has the most turns, if they differ."""
    return -(-config.rounds.num_rounds // _num_groups(config, topology))


def _num_groups(config: RunConfig, topology: Topology) -> int:
    """Within how many rounds every path has its turn."""
    return -(-topology.num_paths // (config.rounds.paths_per_round or topology.num_paths))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One round of one replica of a path."""

    path: PathID
    tokens: int
    loss: float


class _Training:
    """The parts of the loop that need the start, the device and the directory."""

    def __init__(
        self,
        start: Start,
        directory: Path,
        device: torch.device | str,
        options: Options,
        on_step: Callable[[PathID, int], None],
    ) -> None:
        self._start = start
        self._config = start.config
        self._directory = directory
        self._device = device
        self._options = options
        self._on_step = on_step

    def begin(self) -> RoundFiles:
        """Round 0: every module as it starts, and what each path is worth before any training."""
        states = {
            module: self._start.module_state(module) for module in self._start.topology.modules
        }
        with next_round(self._directory, self._config) as files:
            for module, state in states.items():
                files.write_state(module, state)
            evaluations: Evaluations = {}
            for path in self._start.topology.paths:
                evaluations[path] = self.evaluate(path, self._start.sharding, states, files)
            report = RoundReport(round=0, losses={}, evaluations=evaluations, norm_ratios={})
            files.write_reports([report])
        begun = latest_round(self._directory, self._config)
        assert begun is not None
        return begun

    def check(self, latest: RoundFiles, num_rounds: int) -> None:
        """ConfigError unless the rounds there are can be those of a training with these options."""
        hint = f"train into another directory, or delete {self._directory}"
        num_replicas = latest.num_replicas()
        if num_replicas not in (0, self._options.replicas):
            raise ConfigError(f"this training has {num_replicas} replicas of each path", hint=hint)
        paths = self._start.topology.paths
        has_stopped = any(latest.early_stopped_file(path).exists() for path in paths)
        if self._options.early_stopping and latest.number >= max(1, num_rounds) and not has_stopped:
            raise ConfigError("this training ended without early stopping", hint=hint)

    def sharding(self, round_: int, states: States) -> Sharding:
        """The shards of a round; made now, by the paths as they are, if it begins a phase."""
        sharding = sharding_of_round(self._start, self._directory, round_)
        if sharding != self._start.sharding and not sharding.is_done:
            self._reshard(states, sharding.directory)
        return sharding

    def train(
        self,
        paths: list[PathID],
        round_: int,
        sharding: Sharding,
        states: States,
        files: RoundFiles,
    ) -> list[_Turn]:
        """Train all replicas of the paths, and put aside how far each of their modules moved."""
        turns = []
        seats = [(path, replica) for path in paths for replica in range(self._options.replicas)]
        for first in range(0, len(seats), self._options.side_by_side):
            group = seats[first : first + self._options.side_by_side]
            trainers = [self._trainer(path, sharding.shard(path), states) for path, _ in group]
            replicas = self._options.replicas
            for trainer, (path, replica) in zip(trainers, group, strict=True):
                file = files.optimizer_file(path, replica)
                if not trainer.load_optimizer(file) and file.exists():
                    raise BadBytes(f"{file} is damaged", hint=DAMAGED_HINT)
                trainer.seek(trainer.num_steps * replicas + replica, stride=replicas)
            losses = self._train(trainers, round_)
            for trainer, seat, loss in zip(trainers, group, losses, strict=True):
                trainer.save_optimizer(files.optimizer_file(*seat), flush=False)
                self._put_aside(trainer, states, files, seat)
                tokens = self._config.rounds.inner_steps * trainer.tokens_per_step
                turns.append(_Turn(path=trainer.path, tokens=tokens, loss=loss))
        return turns

    def contributions(
        self, module: ModuleID, turns: list[_Turn], files: RoundFiles
    ) -> list[Contribution]:
        """What the paths through a module contribute to it, in the order of their turns."""
        modules_of = self._start.topology.modules_of
        turns = [turn for turn in turns if module in modules_of(turn.path)]
        size = num_parameters(self._config.model, self._start.topology, module)
        encoded = (
            EncodedGradient(raw, self._config.outer.wire_format, num_parameters=size)
            for raw in files.put_aside_of(module)
        )
        return [
            Contribution(path=turn.path, tokens=turn.tokens, gradient=gradient)
            for turn, gradient in zip(turns, encoded, strict=True)
        ]

    def _train(self, trainers: list[PathTrainer], round_: int) -> list[float]:
        """One round of inner steps; the mean loss of each trainer."""
        inner_steps = self._config.rounds.inner_steps
        losses = []
        for step in range(inner_steps):
            position = round_ * inner_steps + step
            for trainer in trainers:
                trainer.begin_step(position)
            losses.append(torch.stack([trainer.end_step() for trainer in trainers]))
            for trainer in trainers:
                self._on_step(trainer.path, position)
        means: list[float] = torch.stack(losses).mean(dim=0).tolist()
        return means

    def score(self, path: PathID, sharding: Sharding, states: States) -> Evaluation:
        """A path with the modules as they are."""
        trainer = self._trainer(path, sharding.shard(path), states)
        return trainer.evaluate(self._config.rounds.eval_sequences)

    def score_start(self, sharding: Sharding) -> Evaluations:
        """Every path as it was before any training; the modules of a level were alike then."""
        levels = self._start.topology.levels
        alike = [self._start.module_state(ModuleID(level.index, 0)) for level in levels]
        states = {module: alike[module.level] for module in self._start.topology.modules}
        return {path: self.score(path, sharding, states) for path in self._start.topology.paths}

    def evaluate(
        self, path: PathID, sharding: Sharding, states: States, files: RoundFiles
    ) -> Evaluation:
        """A path with the modules as they are; kept, where asked for, if it was never better."""
        trainer = self._trainer(path, sharding.shard(path), states)
        num_rows = self._config.rounds.eval_sequences
        evaluation = trainer.evaluate(num_rows)
        kept = files.early_stopped_file(path)
        if self._options.early_stopping or kept.exists():
            keep_if_best(
                kept,
                {module: states[module].parameters for module in trainer.modules},
                evaluation,
                rows=trainer.valid_rows(num_rows),
                round_number=files.number,
                flush=False,
            )
        return evaluation

    def _trainer(self, path: PathID, shard: Shard, states: States) -> PathTrainer:
        trainer = PathTrainer(
            self._config,
            self._start.topology,
            path,
            shard,
            device=self._device,
            compiled=self._options.compiled,
        )
        for module in trainer.modules:
            trainer.write_module(module, states[module].parameters)
        return trainer

    def _put_aside(
        self, trainer: PathTrainer, states: States, files: RoundFiles, seat: tuple[PathID, int]
    ) -> None:
        """Old minus new of each module, as it goes over the wire."""
        wire_format = self._config.outer.wire_format
        residuals = files.residuals(*seat)
        for module in trainer.modules:
            gradient = states[module].parameters - trainer.read_module(module)
            raw, residual = compress_with_feedback(gradient, residuals.get(module), wire_format)
            if residual is not None:
                residuals[module] = residual
            files.put_aside(module, raw)
        files.write_residuals(*seat, residuals)

    def _reshard(self, states: States, directory: Path) -> None:
        """Shard the corpus anew, by the path that predicts the router data best (paper 2.4.2)."""
        rows = self._start.router_data()
        scores = []
        for path in self._start.topology.paths:
            shard = Shard(path=path, train=rows, valid=rows)
            scores.append(self._trainer(path, shard, states).score_rows(rows))
        scores_NP = torch.stack(scores, dim=1)
        reshard_corpus(self._start, self._config, scores_NP, directory, device=self._device)


def sharding_of_round(start: Start, directory: Path, round_: int) -> Sharding:
    """The shards of a round of the training in `directory`: those of the start, or of the last
    discriminative phase before it, which may not be done yet.
    """
    phase = start.config.routing.phase_in_force(round_)
    return Sharding(start.config, directory / f"sharding-{phase:06}") if phase else start.sharding
