"""Inner steps of several paths on one device: all at once, against one after another.

Both train the same paths on the same rows, in turns short enough that what else the machine does
falls on both alike. `speed-up` is the median over pairs of turns.

On a CPU there is no difference: one step after another is computed.

    python -m benchmarks.side_by_side --device cuda [--config FILE] [--json FILE]
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.inner_step import DEMO_FILE, Step, a_shard, paired, run_turns
from dipaco.config import RunConfig, TopologyConfig
from dipaco.device import find_device
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.topology import Topology

NUM_PATHS = (1, 4, 16)
STEPS_PER_TURN = 10


def some_trainers(config: RunConfig, device: torch.device) -> list[PathTrainer]:
    """One for each path, all from the same parameters."""
    topology = Topology.of(config)
    shard = a_shard(config, topology)
    net = PathNet(config.model)
    initialize(net, 0)
    trainers = []
    for path in topology.paths:
        trainer = PathTrainer(config, topology, path, replace(shard, path=path), device=device)
        for module in trainer.modules:
            trainer.write_module(module, read_module(net, topology, module))
        trainers.append(trainer)
    return trainers


def loops(config: RunConfig, device: torch.device) -> dict[str, Step]:
    """The two loops; one step of a loop is one step of every path."""
    alone, together = some_trainers(config, device), some_trainers(config, device)

    def one_after_another(number: int) -> None:
        for trainer in alone:
            trainer.train_step(number)

    def side_by_side(number: int) -> None:
        for trainer in together:
            trainer.begin_step(number)
        for trainer in together:
            trainer.end_step()

    return {"one after another": one_after_another, "side by side": side_by_side}


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=DEMO_FILE)
@click.option("--device", "device_name", default="cuda", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--turns", "num_turns", type=int, default=20, show_default=True)
def main(
    json_file: Path | None, config_file: Path, device_name: str, threads: int, num_turns: int
) -> None:
    """Compare training paths at once with training one after another."""
    torch.set_num_threads(threads)
    device = find_device(device_name)
    run = RunConfig.from_toml(config_file.read_text())
    table = Table("paths", "one after another, tokens/s", "side by side, tokens/s", "speed-up")
    figures = {}
    for num_paths in NUM_PATHS:
        config = replace(run, topology=TopologyConfig(levels=(num_paths,)))
        seconds = run_turns(loops(config, device), num_turns, STEPS_PER_TURN, device)
        step_tokens = config.inner.batch_sequences * config.model.sequence_tokens
        tokens = num_paths * STEPS_PER_TURN * step_tokens
        speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
        speed_up = paired(seconds["one after another"], seconds["side by side"])
        cells = [f"{speed:,.0f}" for speed in speeds.values()]
        table.add_row(str(num_paths), *cells, f"{speed_up:.2f}")
        figures[num_paths] = {"tokens_per_second": speeds, "speed_up": speed_up}
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
