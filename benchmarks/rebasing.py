"""What it costs that versions arrive late, and training goes on: re-basing against blocking.

All paths of a tiny model, each a `PathWork` as in a peer, in one process without a network. The
outer gradients of a slot are averaged at its end; the versions that come of it reach the paths a
share of the next slot later, and are put under what was trained meanwhile. Share 0 is an exact,
blocking run. All take the same inner steps on the same rows; the loss is that of the certified
model at the end.

    python -m benchmarks.rebasing [--rounds 30] [--steps 20] [--json FILE]
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.churn import config_of
from dipaco.checkpoint import ModuleState
from dipaco.compression import decode
from dipaco.evaluate import NOTHING, evaluate
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, write_module
from dipaco.outer import apply_contributions, contribution_weights
from dipaco.preparation import prepare_start
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID
from peer.path_work import Offer, PathWork

SHARES_LATE = (0.0, 0.1, 0.5, 1.0)
NO_LIMIT = 1e6  # seconds
MAX_COST = 0.01

States = dict[ModuleID, ModuleState]


class Swarm:
    """One peer per path, all of them in step."""

    def __init__(self, start: Start, directory: Path) -> None:
        self.states: States = {m: start.module_state(m) for m in start.topology.modules}
        self._start = start
        self._version = 0
        self._works: dict[PathID, PathWork] = {}
        self._begin(directory)

    def _begin(self, directory: Path) -> None:
        start = self._start
        for path in start.topology.paths:
            trainer = PathTrainer(start.config, start.topology, path, start.shard(path))
            work = PathWork(trainer, directory / str(path))
            for module in trainer.modules:
                work.begin(module, self._version, "", self.states[module])
            self._works[path] = work

    def move(self, old: Path, new: Path, handover: Callable[[Path, Path], None]) -> None:
        """Let other peers go on, in the directory `new`, after `handover` of their `old` ones."""
        for work in self._works.values():
            work.save()
        handover(old, new)
        self._begin(new)

    def train(self, first_step: int, num_steps: int) -> None:
        """Inner steps of a slot on all paths, the first of which is its `first_step`."""
        for work in self._works.values():
            if num_steps:
                work.train(seconds=NO_LIMIT, max_steps=num_steps, first_step=first_step)

    def average(self, slot: int) -> None:
        """Take everyone's outer gradients, and make the next version of every module of them."""
        config, topology = self._start.config, self._start.topology
        offered: dict[ModuleID, list[tuple[PathID, Offer]]] = {m: [] for m in self.states}
        for path, work in self._works.items():
            for offer in work.offers(slot, config):
                offered[offer.module].append((path, offer))
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
            update = apply_contributions(self.states[module], weighted, num_paths, config.outer)
            self.states[module] = update.state
        self._version += 1

    def arrive(self, slot: int) -> None:
        """Put the newest versions, in which everyone's outer gradients of `slot` count, under."""
        for work in self._works.values():
            for module in work.trainer.modules:
                work.rebase(module, self._version, "", self.states[module], counted=slot)

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


def train(start: Start, directory: Path, share_late: float) -> float:
    """The loss at the end of a run whose versions arrive `share_late` of a slot late."""
    swarm, rounds = Swarm(start, directory), start.config.rounds
    steps_late = round(share_late * rounds.inner_steps)
    for slot in range(rounds.num_rounds):
        swarm.train(0, steps_late)
        if slot:
            swarm.arrive(slot - 1)
        swarm.train(steps_late, rounds.inner_steps - steps_late)
        swarm.average(slot)
    return swarm.loss()


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--rounds", "num_rounds", type=int, default=30, show_default=True)
@click.option("--steps", "inner_steps", type=int, default=20, show_default=True)
def main(json_file: Path | None, num_rounds: int, inner_steps: int) -> None:
    """Compare versions that arrive late with versions that are waited for."""
    torch.set_num_threads(1)
    config = config_of((2, 2))
    rounds = replace(config.rounds, num_rounds=num_rounds, inner_steps=inner_steps)
    config = replace(config, rounds=rounds)
    table = Table("late by, slots", "loss, nats per token", "against blocking")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        start = prepare_start(config, Path(name) / "start")
        for share in SHARES_LATE:
            loss = train(start, Path(name) / str(share), share)
            figures[str(share)] = loss
            table.add_row(str(share), f"{loss:.4f}", f"{loss / figures['0.0'] - 1:+.2%}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if max(figures.values()) > (1 + MAX_COST) * figures["0.0"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
