"""Inner-step throughput of a peer against a bare PyTorch loop and one with `transformers`.

All train a network of the same shape on the same batches with fused AdamW and gradient clipping,
in one process, in turns short enough that what else the machine does falls on all alike. The goals
are `ratio_to_bare` >= 0.97 and `ratio_to_transformers` >= 1.0. The loop `compiled` is that of a
peer with `--compile`.

`mfu` is the share of the device's matrix multiplication that goes into the model: 6 operations per
token for each weight that tokens are multiplied by, and 12 x blocks x positions x width of all
heads for attention, whose causal half is not discounted. What the device can do is measured beside
the loops, in turns of its own: one multiplication of large square matrices, in the format in which
the loops multiply (float32, or bfloat16 on a GPU).

    python -m benchmarks.inner_step [--batch N] [--json FILE]
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dipaco.config import ModelConfig, RunConfig
from dipaco.device import find_device
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.shards import Shard
from dipaco.topology import Topology

DEMO_FILE = Path(__file__).parents[1] / "examples" / "demo.toml"
NUM_WARMUP_TURNS = 2
MATMUL_WIDTH = {"cpu": 1024, "cuda": 8192}

Step = Callable[[int], object]
"""Takes the number of the step."""


def a_shard(config: RunConfig, topology: Topology) -> Shard:
    """Random rows; the arithmetic does not depend on what they say."""
    shape = (64 * config.inner.batch_sequences, config.model.sequence_tokens)
    rows = np.random.default_rng(0).integers(2, config.model.vocab_size, shape, dtype=np.uint16)
    return Shard(path=topology.paths[0], train=rows, valid=rows[:1])


def plain_step(
    net: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    config: RunConfig,
    shard: Shard,
    device: torch.device,
) -> Step:
    """The loop that anyone would write around a network; `loss_of` maps tokens to the loss."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=True)
    size = config.inner.batch_sequences
    rows = torch.from_numpy(shard.train.astype(np.int64))

    def step(number: int) -> torch.Tensor:
        start = number * size % len(rows)
        tokens = rows[start : start + size].to(device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def bare_step(config: RunConfig, shard: Shard, device: torch.device) -> Step:
    """Our network in a plain loop."""
    net = PathNet(config.model, device)
    initialize(net, 0)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(net(tokens).flatten(0, 1).float(), targets.flatten())

    return plain_step(net, loss_of, config, shard, device)


def transformers_step(config: RunConfig, shard: Shard, device: torch.device) -> Step:
    """Hugging Face's network in a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.width,
            num_hidden_layers=model.num_blocks,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_width,
            intermediate_size=model.ffn_width,
            max_position_embeddings=model.sequence_tokens,
            tie_word_embeddings=model.tied_embedding,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    return plain_step(net, lambda t: net(input_ids=t, labels=t).loss, config, shard, device)


def peer_step(
    config: RunConfig, shard: Shard, device: torch.device, *, compiled: bool = False
) -> Step:
    """The step that peers take."""
    topology = Topology.of(config)
    trainer = PathTrainer(config, topology, shard.path, shard, device=device, compiled=compiled)
    net = PathNet(config.model)
    initialize(net, 0)
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    return trainer.train_step


def matmul_step(device: torch.device) -> tuple[Step, int]:
    """One multiplication of square matrices, and its number of operations."""
    width = MATMUL_WIDTH[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return lambda number: a @ b, 2 * width**3


def operations_per_token(config: ModelConfig) -> int:
    """Operations of the model's arithmetic per training token, forward and backward."""
    attention = 2 * config.width * config.head_width * (config.num_heads + config.num_kv_heads)
    block = attention + 3 * config.width * config.ffn_width
    weights = config.num_blocks * block + config.vocab_size * config.width
    heads_width = config.num_heads * config.head_width
    return 6 * weights + 12 * config.num_blocks * config.sequence_tokens * heads_width


def turn_seconds(step: Step, first: int, num_steps: int, device: torch.device) -> float:
    """Seconds of one turn, until the device has done its work."""
    start = time.perf_counter()
    for number in range(first, first + num_steps):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired(numerator: list[float], denominator: list[float]) -> float:
    """Median ratio of turns, pair by pair, so that a slow moment of the machine cancels out."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=DEMO_FILE)
@click.option("--batch", type=int, help="Sequences per step.  [default: what the run says]")
@click.option("--device", "device_name", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--turns", "num_turns", type=int, default=80, show_default=True)
@click.option("--steps", "num_steps", type=int, default=1, show_default=True, help="Per turn.")
def main(  # noqa: PLR0913 - the options of a command
    json_file: Path | None,
    config_file: Path,
    batch: int | None,
    device_name: str,
    threads: int,
    num_turns: int,
    num_steps: int,
) -> None:
    """Compare a peer's inner step with plain loops."""
    torch.set_num_threads(threads)
    device = find_device(device_name)
    config = RunConfig.from_toml(config_file.read_text())
    inner = replace(config.inner, batch_sequences=batch or config.inner.batch_sequences)
    config = replace(config, inner=inner)
    shard = a_shard(config, Topology.of(config))
    steps = {
        "bare": bare_step(config, shard, device),
        "peer": peer_step(config, shard, device),
        "compiled": peer_step(config, shard, device, compiled=True),
        "transformers": transformers_step(config, shard, device),
    }
    matmul, matmul_operations = matmul_step(device)
    seconds = run_turns(steps | {"matmul": matmul}, num_turns, num_steps, device)
    peak = matmul_operations * num_steps / statistics.median(seconds["matmul"])
    tokens = num_steps * inner.batch_sequences * config.model.sequence_tokens
    used = tokens * operations_per_token(config.model) / (matmul_operations * num_steps)
    figures = {
        **{f"ratio_to_{name}": paired(seconds[name], seconds["peer"]) for name in steps},
        "mfu": used * paired(seconds["matmul"], seconds["peer"]),
        "matmul_gflops": peak / 1e9,
        **{f"{n}_tokens_per_second": tokens / statistics.median(seconds[n]) for n in steps},
        "device": str(device),
        "threads": threads,
        "batch_sequences": inner.batch_sequences,
    }
    table = Table("loop", "tokens/s", "ms per step", "time of the peer's")
    for name in steps:
        milliseconds = 1000 * statistics.median(seconds[name]) / num_steps
        speed = figures[f"{name}_tokens_per_second"]
        ratio = figures[f"ratio_to_{name}"]
        table.add_row(name, f"{speed:,.0f}", f"{milliseconds:.1f}", f"{ratio:.3f}")
    Console().print(table)
    for name in ("ratio_to_bare", "ratio_to_transformers", "mfu"):
        click.echo(f"{name} {figures[name]:.3f}")
    click.echo(f"matmul {peak / 1e9:,.0f} GFLOP/s")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def run_turns(
    steps: dict[str, Step], num_turns: int, num_steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each turn of each loop, warm-up left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    console = Console(stderr=True)
    for turn in track(range(num_turns + NUM_WARMUP_TURNS), "inner steps", console=console):
        # Alternate who goes first: the second of a pair finds warmer caches.
        for name in sorted(steps, reverse=bool(turn % 2)):
            seconds[name].append(turn_seconds(steps[name], turn * num_steps, num_steps, device))
    return {name: times[NUM_WARMUP_TURNS:] for name, times in seconds.items()}


if __name__ == "__main__":
    main()
