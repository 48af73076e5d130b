"""What a training left, for those who use the model: one path at a time, never the whole.

A directory holds a preparation and, next to it, one training per configuration. The router needs
the dense start, which has one path's size; everything else is loaded path by path.
"""

# ruff: noqa: N806 - tensors carry their shape in their name: B sequences, T tokens

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dipaco.checkpoint import write_atomically
from dipaco.config import RunConfig
from dipaco.document import Split
from dipaco.early_stopping import Best, read_best
from dipaco.errors import ConfigError
from dipaco.evaluate import Evaluation, token_nll
from dipaco.model import PathNet, num_parameters, write_module
from dipaco.preparation import Progress
from dipaco.reference import sharding_of_round
from dipaco.rerouting import boundaries, choices_of_router, evaluate_choices
from dipaco.rounds import RoundFiles, hold_latest_round
from dipaco.routing import FeatureExtractor, Router, ranking
from dipaco.sharding import Sharding
from dipaco.shards import Rows, evenly_spread
from dipaco.start import Start
from dipaco.token_router import BestPaths, Labels, TokenRouter, train_token_router
from dipaco.topology import PathID

TOKEN_ROUTER_FILE = "token-router.safetensors"
_SCORED_ROWS = 1024  # at a time


def training_directory(directory: Path, config: RunConfig) -> Path:
    """Where a training of this configuration lies: another configuration, another place."""
    return directory / f"training-{config.fingerprint()[:12]}"


@dataclass(frozen=True)
class TrainedModel:
    """The modules after the last complete round, the router in force, and the tokenizer.

    The training may go on meanwhile: the files of that round stay.
    """

    start: Start
    files: RoundFiles
    device: torch.device

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> "TrainedModel":
        """The training of the configuration that `directory` was last prepared for.

        ConfigError if there is none.
        """
        start = Start.load(directory)
        files = hold_latest_round(training_directory(directory, start.config), start.config)
        if files is None:
            raise ConfigError(
                f"{directory} holds no training of {start.config.name}",
                hint=f"train it: `dipaco train CONFIG --dir {directory}`",
            )
        return cls(start, files, torch.device(device))

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.start.config

    @property
    def round(self) -> int:
        """Number of rounds that were trained."""
        return self.files.number

    @property
    def token_router_file(self) -> Path:
        """Where the token-level router of this training lies, if there is one."""
        return self.files.directory.parent / TOKEN_ROUTER_FILE

    @cached_property
    def sharding(self) -> Sharding:
        """The router and shards of the last round."""
        return sharding_of_round(self.start, self.files.directory.parent, max(0, self.round - 1))

    @cached_property
    def router(self) -> Router:
        """What chooses the path of a prefix."""
        return self.sharding.router()

    @cached_property
    def features(self) -> FeatureExtractor:
        """What the router sees."""
        return self.start.feature_extractor(self.device)

    @cached_property
    def token_router(self) -> TokenRouter:
        """What chooses the path at any token; ConfigError if it was not trained."""
        try:
            raw = self.token_router_file.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(
                "this training has no token-level router",
                hint=f"train it: `dipaco train-router {self.start.directory}`",
            ) from error
        return TokenRouter.from_bytes(raw, self.config).to(self.device)

    def best(self, number: int, early_stopped: bool | None) -> Best | None:
        """A path, by its number, as it did best on its validation rows; None to take the last one.

        `early_stopped` says which of the two is wanted; None stands for its best, where that was
        kept since its shard was made. ConfigError if it is wanted and was not.
        """
        if early_stopped is False:
            return None
        topology = self.start.topology
        path = topology.path_at(number)
        modules = topology.modules_of(path)
        sizes = {m: num_parameters(self.config.model, topology, m) for m in modules}
        best = read_best(self.files.early_stopped_file(path), sizes)
        if best is not None and not best.is_on(self._valid_rows(path)):
            best = None
        if early_stopped and best is None:
            raise ConfigError(
                f"path {path} was not kept as it did best",
                hint="train with --early-stopping (a sharding begins anew), or take it with --last",
            )
        return best

    def _valid_rows(self, path: PathID) -> Rows:
        """The rows that the path is scored on after a round."""
        return self.sharding.shard(path).valid[: self.config.rounds.eval_sequences]

    def net(self, number: int, *, early_stopped: bool | None = False) -> PathNet:
        """The network of a path, by its number: `early_stopped` as in `best`."""
        topology = self.start.topology
        net = PathNet(self.config.model)
        best = self.best(number, early_stopped)
        if best is not None:
            parameters = best.parameters
        else:
            modules = topology.modules_of(topology.path_at(number))
            parameters = {module: self.files.state(module).parameters for module in modules}
        for module, vector in parameters.items():
            write_module(net, topology, module, vector)
        return net.to(self.device)

    def choose(self, tokens: Sequence[int]) -> int:
        """The number of the path for what follows `tokens`, by their last `prefix_tokens`.

        A shorter text is repeated to that length, because the router only knows such prefixes.
        """
        prefix_tokens = self.config.routing.prefix_tokens
        if not tokens:
            raise ConfigError("the prompt is empty", hint="the prompt chooses the path: write some")
        window = np.resize(np.array(tokens[-prefix_tokens:], dtype=np.uint16), (1, prefix_tokens))
        best = ranking(self.router, window, self.features, prefix_tokens=prefix_tokens, num_best=1)
        return int(best[0, 0])

    def path(self, name: str) -> PathID:
        """The path of that name; ConfigError if there is none."""
        topology = self.start.topology
        try:
            path = PathID.parse(name)
        except ValueError:
            path = PathID((-1,))
        if not topology.has_path(path):
            raise ConfigError(
                f"there is no path {name!r}",
                hint=f"paths go from {topology.paths[0]} to {topology.paths[-1]}",
            )
        return path


def sample(start: Start, split: Split, max_sequences: int) -> Rows:
    """At most so many sequences [n, T] of a split, evenly spread; ConfigError if it has none."""
    rows = start.rows(split)
    if not len(rows):
        raise ConfigError(
            f"the {split} part of the corpus is empty",
            hint=f"raise corpus.{split}_fraction and train again, or use another --split",
        )
    return evenly_spread(rows, max_sequences)


def evaluate_model(
    model: TrainedModel,
    rows: Rows,
    *,
    every: int = 0,
    by_token: bool = False,
    early_stopped: bool | None = False,
    on_path: Progress = lambda stage, done, total: None,
) -> dict[int, Evaluation]:
    """Score sequences, by path number, re-routed every `every` tokens unless 0.

    The first path is always the router's. `by_token` lets the token-level router choose the ones
    after it. `early_stopped` as in `TrainedModel.best`.
    """
    config = model.config
    prefix_tokens = config.routing.prefix_tokens
    at = boundaries(
        prefix_tokens=prefix_tokens, sequence_tokens=config.model.sequence_tokens, every=every
    )
    routed = at[:1] if by_token else at
    choices = choices_of_router(
        model.router, rows, model.features, prefix_tokens=prefix_tokens, at=routed
    )
    if by_token:
        choices = np.concatenate([choices, model.token_router.choose(rows, at[1:])], axis=1)
    numbers = np.unique(choices)
    stage = f"every {every} tokens" if every else "once per sequence"
    done = itertools.count(1)

    def forward_of(number: int) -> Callable[[Tensor], Tensor]:
        on_path(stage, next(done), len(numbers))
        return model.net(number, early_stopped=early_stopped)

    return evaluate_choices(
        forward_of,
        rows,
        choices,
        at=at,
        model=config.model,
        device=model.device,
    )


def train_token_router_of(
    model: TrainedModel,
    num_steps: int,
    progress: Progress = lambda stage, done, total: None,
    *,
    early_stopped: bool | None = False,
) -> TokenRouter:
    """Train the token-level router for the paths as they are used, and keep it (paper 7.2.2).

    Scores the router data under one path after another; `early_stopped` as in `TrainedModel.best`.
    ConfigError if there is none.
    """
    rows = model.start.router_data()
    router = train_token_router(
        model.start.net().to(model.device),
        rows,
        _labels(model, rows, early_stopped, progress),
        config=model.config,
        num_steps=num_steps,
        on_progress=lambda done, total: progress("token-level router", done, total),
    )
    router.round.fill_(model.round)
    write_atomically(model.token_router_file, router.to_bytes())
    return router


def _labels(
    model: TrainedModel, rows: Rows, early_stopped: bool | None, progress: Progress
) -> Labels:
    """The best path after each token, by how each of them predicts what follows."""
    num_paths = model.config.topology.num_paths
    best = BestPaths(*rows.shape)
    for number in range(num_paths):
        net = model.net(number, early_stopped=early_stopped)
        for start in range(0, len(rows), _SCORED_ROWS):
            part = slice(start, start + _SCORED_ROWS)
            nll_BT = token_nll(
                net,
                torch.from_numpy(rows[part].astype(np.int64)).to(model.device),
                prefix_tokens=model.config.routing.prefix_tokens,
                model=model.config.model,
            )
            best.add(number, part, -nll_BT.numpy())
        progress("router data", number + 1, num_paths)
    return best.labels()
