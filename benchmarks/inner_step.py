"""Inner-step throughput of a peer against a bare PyTorch loop.

Both train the same network on the same batches with fused AdamW and gradient clipping, in one
process, in turns short enough that what else the machine does falls on both alike. The goal is
`ratio_to_bare` >= 0.97.

    python -m benchmarks.inner_step [--json FILE]
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dipaco.config import RunConfig
from dipaco.device import find_device
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.shards import Shard
from dipaco.topology import Topology

DEMO_FILE = Path(__file__).parents[1] / "examples" / "demo.toml"
NUM_WARMUP_TURNS = 2


def a_shard(config: RunConfig, topology: Topology) -> Shard:
    """Random rows; the arithmetic does not depend on what they say."""
    shape = (64 * config.inner.batch_sequences, config.model.sequence_tokens)
    rows = np.random.default_rng(0).integers(2, config.model.vocab_size, shape, dtype=np.uint16)
    return Shard(path=topology.paths[0], train=rows, valid=rows[:1])


def bare_step(config: RunConfig, shard: Shard, device: torch.device) -> Callable[[int], object]:
    """The loop that anyone would write."""
    net = PathNet(config.model, device)
    initialize(net, 0)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=True)
    size = config.inner.batch_sequences
    rows = torch.from_numpy(shard.train.astype(np.int64))

    def step(number: int) -> torch.Tensor:
        start = number * size % len(rows)
        tokens = rows[start : start + size].to(device, non_blocking=True)
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = net(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peer_step(config: RunConfig, shard: Shard, device: torch.device) -> Callable[[int], object]:
    """The step that peers take."""
    topology = Topology.of(config)
    trainer = PathTrainer(config, topology, shard.path, shard, device=device)
    net = PathNet(config.model)
    initialize(net, 0)
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    return trainer.train_step


def turn_seconds(
    step: Callable[[int], object], first: int, num_steps: int, device: torch.device
) -> float:
    """Seconds of one turn, until the device has done its work."""
    start = time.perf_counter()
    for number in range(first, first + num_steps):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=DEMO_FILE)
@click.option("--device", "device_name", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--turns", "num_turns", type=int, default=80, show_default=True)
@click.option("--steps", "num_steps", type=int, default=1, show_default=True, help="Per turn.")
def main(
    json_file: Path | None,
    config_file: Path,
    device_name: str,
    threads: int,
    num_turns: int,
    num_steps: int,
) -> None:
    """Compare a peer's inner step with a bare loop."""
    torch.set_num_threads(threads)
    device = find_device(device_name)
    config = RunConfig.from_toml(config_file.read_text())
    shard = a_shard(config, Topology.of(config))
    steps = {"bare": bare_step(config, shard, device), "peer": peer_step(config, shard, device)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    console = Console(stderr=True)
    for turn in track(range(num_turns + NUM_WARMUP_TURNS), "inner steps", console=console):
        # Alternate who goes first: the second of a pair finds warmer caches.
        for name in sorted(steps, reverse=bool(turn % 2)):
            seconds[name].append(turn_seconds(steps[name], turn * num_steps, num_steps, device))
    kept = {name: times[NUM_WARMUP_TURNS:] for name, times in seconds.items()}
    tokens = num_steps * config.inner.batch_sequences * config.model.sequence_tokens
    speeds = {name: tokens / statistics.median(times) for name, times in kept.items()}
    # Turns are compared pair by pair, so that a slow moment of the machine cancels out.
    ratio = statistics.median(b / p for b, p in zip(kept["bare"], kept["peer"], strict=True))
    table = Table("loop", "tokens/s", "ms per step")
    for name, speed in speeds.items():
        milliseconds = 1000 * statistics.median(kept[name]) / num_steps
        table.add_row(name, f"{speed:,.0f}", f"{milliseconds:.1f}")
    Console().print(table)
    click.echo(f"ratio_to_bare {ratio:.3f}")
    if json_file is not None:
        figures = {
            "ratio_to_bare": ratio,
            "peer_tokens_per_second": speeds["peer"],
            "bare_tokens_per_second": speeds["bare"],
            "device": str(device),
            "threads": threads,
        }
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
