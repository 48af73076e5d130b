"""Whether an inner optimizer's state should follow a path that another peer takes over.

All paths of a tiny model as in `benchmarks.rebasing`, blocking. Every few rounds each path goes to
the other one of two peers, which starts with a new AdamW that warms up, with the state it was left
with when it last trained the path (what the swarm does), or with the state of the peer before:
exact, or in 8-bit blocks of bitsandbytes. Equal steps everywhere; in `stays` no path ever moves.

    python -m benchmarks.handover [--rounds 30] [--steps 20] [--every 3] [--json FILE]
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from rich.console import Console
from rich.table import Table

from benchmarks.churn import config_of
from benchmarks.rebasing import Swarm
from dipaco.preparation import prepare_start
from dipaco.start import Start
from dipaco.tensors import decode_tensors, encode_tensors, layout_of

Handover = Callable[[Path, Path], None]
"""Does to the new peer's directory what is done when a path comes from the old one's."""


def start_anew(old: Path, new: Path) -> None:
    """The new peer has nothing."""
    shutil.rmtree(new, ignore_errors=True)


def keep_own(old: Path, new: Path) -> None:
    """The new peer has what it was left with, if it trained the path before."""


def hand_over(old: Path, new: Path) -> None:
    """The new peer gets the state of the old one."""
    shutil.copytree(old, new, dirs_exist_ok=True)


def hand_over_8bit(old: Path, new: Path) -> None:
    """The same, with both moments in 8-bit blocks, as `AdamW8bit` holds them."""
    hand_over(old, new)
    for file in new.rglob("*.optimizer"):
        raw = file.read_bytes()
        tensors = decode_tensors(raw, layout_of(raw))
        for name, tensor in tensors.items():
            if name.endswith(("exp_avg", "exp_avg_sq")):
                tensors[name] = dequantize_blockwise(*quantize_blockwise(tensor)).contiguous()
        file.write_bytes(encode_tensors(tensors))


WAYS: dict[str, Handover | None] = {
    "stays": None,
    "new, warms up": start_anew,
    "its own, older": keep_own,
    "handed over": hand_over,
    "handed over, 8-bit": hand_over_8bit,
}


def train(start: Start, directory: Path, every: int, handover: Handover | None) -> float:
    """The loss at the end of a run whose paths change hands `every` so many rounds."""
    swarm = Swarm(start, directory / "0")
    rounds = start.config.rounds
    for slot in range(rounds.num_rounds):
        swarm.train(0, rounds.inner_steps)
        swarm.average(slot)
        swarm.arrive(slot)
        if handover is not None and (slot + 1) % every == 0:
            turn = (slot + 1) // every
            old, new = (directory / str(number % 2) for number in (turn - 1, turn))
            swarm.move(old, new, handover)
    return swarm.loss()


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--rounds", "num_rounds", type=int, default=30, show_default=True)
@click.option("--steps", "inner_steps", type=int, default=20, show_default=True)
@click.option("--every", type=int, default=3, show_default=True, help="Rounds between two moves.")
def main(json_file: Path | None, num_rounds: int, inner_steps: int, every: int) -> None:
    """Compare what an optimizer may begin with on a path that was another peer's."""
    torch.set_num_threads(1)
    config = config_of((2, 2))
    rounds = replace(config.rounds, num_rounds=num_rounds, inner_steps=inner_steps)
    config = replace(config, rounds=rounds)
    table = Table("the optimizer's state", "loss, nats per token", "against staying")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        start = prepare_start(config, Path(name) / "start")
        for way, handover in WAYS.items():
            loss = train(start, Path(name) / way, every, handover)
            figures[way] = loss
            table.add_row(way, f"{loss:.4f}", f"{loss / figures['stays'] - 1:+.2%}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
