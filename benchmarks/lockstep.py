"""All paths of a model in one process, in step: a `PathWork` each, as in a peer, without a network.

What the benchmarks of training itself have in common: all ways that they compare take the same
inner steps on the same rows, from the same start; the loss is that of the certified model at the
end.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.churn import config_of
from dipaco.compression import decode
from dipaco.config import RunConfig
from dipaco.evaluate import NOTHING, evaluate
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, write_module
from dipaco.outer import apply_contributions, contribution_weights
from dipaco.preparation import prepare_start
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID
from peer.draft import Offer
from peer.path_work import PathWork

NO_LIMIT = 1e6  # seconds

F = TypeVar("F", bound=Callable[..., None])


class Lockstep:
    """One peer per path, all of them in step."""

    def __init__(self, start: Start, directory: Path) -> None:
        self.states = {m: start.module_state(m) for m in start.topology.modules}
        self.works: dict[PathID, PathWork] = {}
        self._counted: dict[tuple[int, PathID, ModuleID], str] = {}  # blobs, by slot
        self._start = start
        self._version = 0
        self._steps = 0
        self.begin(directory)

    def begin(self, directory: Path) -> None:
        """Give every path to a peer whose disk is `directory`."""
        start = self._start
        for path in start.topology.paths:
            trainer = PathTrainer(start.config, start.topology, path, start.shard(path))
            work = PathWork(trainer, directory / str(path))
            trainer.seek(self._steps)
            for module in trainer.modules:
                work.begin(module, self._version, "", self.states[module])
            self.works[path] = work

    def train(self, first_step: int, num_steps: int) -> None:
        """Inner steps of a slot on all paths, the first of which is its `first_step`."""
        self._steps += num_steps
        for work in self.works.values():
            if num_steps:
                work.train(seconds=NO_LIMIT, max_steps=num_steps, first_step=first_step)

    def average(self, slot: int) -> None:
        """Take everyone's outer gradients, and make the next version of every module of them."""
        config, topology = self._start.config, self._start.topology
        offered: dict[ModuleID, list[tuple[PathID, Offer]]] = {m: [] for m in self.states}
        for path, work in self.works.items():
            for draft in work.drafts(config):
                offer = draft.encode()
                offered[offer.module].append((path, offer))
                self._counted[slot, path, offer.module] = draft.blob
        for module, offers in offered.items():
            size = self.states[module].num_parameters
            weights = contribution_weights(
                [(path, offer.tokens) for path, offer in offers], self._start.shard_tokens
            )
            gradients = [
                decode(offer.raw, config.outer.wire_format, num_parameters=size)
                for _, offer in offers
            ]
            weighted = zip(weights, gradients, strict=True)
            num_paths = topology.num_paths_through(module)
            outer = config.outer.of_module(num_paths)
            update = apply_contributions(self.states[module], weighted, num_paths, outer)
            self.states[module] = update.state
        self._version += 1

    def arrive(self, slot: int) -> None:
        """Put the newest versions, in which everyone's outer gradients of `slot` count, under."""
        for path, work in self.works.items():
            for module in work.trainer.modules:
                state, counted = self.states[module], self._counted[slot, path, module]
                work.rebase(work.rebasing(module, self._version, "", state, counted=counted))

    def loss(self) -> float:
        """Nats per token of the whole model on the validation rows."""
        config, topology = self._start.config, self._start.topology
        net, total = PathNet(config.model), NOTHING
        for path in topology.paths:
            for module in topology.modules_of(path):
                write_module(net, topology, module, self.states[module].parameters)
            rows = torch.from_numpy(self._start.shard(path).valid.astype(np.int64))
            total += evaluate(
                net, rows, prefix_tokens=config.routing.prefix_tokens, model=config.model
            )
        return total.nll_sum / total.num_tokens


def settings(command: F) -> F:
    """The options of `compare`."""
    for option in (
        click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures."),
        click.option(
            "--config",
            "config_file",
            type=click.Path(exists=True, path_type=Path),
            help="Of a run.  [default: a tiny one]",
        ),
        click.option("--rounds", "num_rounds", type=int, default=30, show_default=True),
        click.option("--steps", "inner_steps", type=int, default=20, show_default=True),
    ):
        command = option(command)
    return command


def compare(
    ways: Mapping[str, Callable[[Start, Path], float]],
    *,
    what: str,
    json_file: Path | None,
    config_file: Path | None,
    num_rounds: int,
    inner_steps: int,
) -> dict[str, float]:
    """The loss that each way ends with, given a start and a directory; printed, by the first."""
    torch.set_num_threads(1)
    config = RunConfig.from_toml(config_file.read_text()) if config_file else config_of((2, 2))
    rounds = replace(config.rounds, num_rounds=num_rounds, inner_steps=inner_steps)
    config = replace(config, rounds=rounds)
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        start = prepare_start(config, Path(name) / "start")
        for number, (way, train) in enumerate(ways.items()):
            losses[way] = train(start, Path(name) / str(number))
    first = next(iter(ways))
    table = Table(what, "loss, nats per token", f"against {first}")
    for way, loss in losses.items():
        table.add_row(way, f"{loss:.4f}", f"{loss / losses[first] - 1:+.2%}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(losses, indent=1) + "\n")
    return losses
