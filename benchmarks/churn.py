"""A churn soak: peers with exponential lifetimes, against the same swarm in which everyone stays.

Real text, the real protocol and real training of a tiny model, on the in-memory twins under a
virtual clock. A peer's life ends by a kill or by Ctrl-C, half each; half a slot later, on average,
it is back or another one is there. A bootstrap node, which keeps all and trains nothing, stays.
Perplexity is that of the whole certified model, compared at equal numbers of counted tokens.

    python -m benchmarks.churn [--peers 12] [--levels 3,3] [--rounds 60] [--json FILE]
"""

import json
import os
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import click
import torch
from rich.console import Console
from rich.table import Table

from dipaco.config import RunConfig
from dipaco.preparation import prepare_start
from tests.churn import Churn, Outcome, perplexity_at, soak
from tests.virtual_clock import run_virtual

T = TypeVar("T")
MAX_PERPLEXITY_RATIO = 1.03
MIN_COMMIT_SHARE = 0.95


def config_of(levels: tuple[int, ...]) -> RunConfig:
    """A tiny model on the text that every Python installation has.

    The learning rate stays the same all along: with a schedule, equal tokens would not be equal.
    """
    return RunConfig.from_dict(
        {
            "name": "churn",
            "seed": 1,
            "model": {
                "vocab_size": 512,
                "width": 32,
                "num_blocks": max(2, len(levels)),
                "num_heads": 2,
                "num_kv_heads": 1,
                "ffn_width": 64,
                "sequence_tokens": 64,
            },
            "topology": {"levels": list(levels)},
            "corpus": {
                "source": "python",
                "max_documents": 600,
                "max_document_bytes": 4096,
                "valid_fraction": 0.1,
            },
            "dense_start": {
                "steps": 200,
                "learning_rate": 4e-3,
                "warmup_steps": 20,
                "batch_sequences": 8,
            },
            "inner": {
                "batch_sequences": 8,
                "learning_rate": 1e-3,
                "final_learning_rate_fraction": 1.0,
                "warmup_steps": 5,
            },
            "outer": {"momentum": 0.5},
            "rounds": {
                "num_rounds": 1000,
                "round_seconds": 20.0,
                "inner_steps": 8,
                "eval_sequences": 16,
            },
        }
    )


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run it, without waiting for the disk: nothing here cuts its power."""
    with patch("os.fsync", lambda descriptor: None):
        return run_virtual(main)


def summary(with_churn: Outcome, without: Outcome) -> dict[str, float]:
    """The figures that have a goal, and what they rest on."""
    tokens = min(with_churn.curve[-1][0], without.curve[-1][0])
    perplexity = perplexity_at(with_churn.curve, tokens)
    undisturbed = perplexity_at(without.curve, tokens)
    return {
        "killed": with_churn.num_killed,
        "left": with_churn.num_left,
        "rounds_possible": with_churn.possible,
        "commit_share": with_churn.committed / max(1, with_churn.possible),
        "violations": len(with_churn.violations) + len(without.violations),
        "tokens": tokens,
        "tokens_share": with_churn.curve[-1][0] / len(with_churn.curve)
        / (without.curve[-1][0] / len(without.curve)),
        "perplexity_at_start": without.curve[0][1],
        "perplexity_with_churn": perplexity,
        "perplexity_without": undisturbed,
        "perplexity_ratio": perplexity / undisturbed,
    }  # fmt: skip


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--peers", "num_peers", type=int, default=12, show_default=True)
@click.option("--levels", default="3,3", show_default=True)
@click.option("--rounds", "num_rounds", type=int, default=60, show_default=True)
@click.option("--lifetime", "lifetime_rounds", type=float, default=4.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    json_file: Path | None,
    num_peers: int,
    levels: str,
    num_rounds: int,
    lifetime_rounds: float,
    seed: int,
) -> None:
    """Compare a swarm with churn with one without."""
    torch.set_num_threads(1)
    config = config_of(tuple(int(level) for level in levels.split(",")))
    churn = Churn(
        num_peers=num_peers, num_slots=num_rounds, lifetime_rounds=lifetime_rounds, seed=seed
    )
    begin = time.monotonic()
    memory = Path("/dev/shm")  # thousands of small files: a disk would take most of the time
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        directory = Path(name)
        start = prepare_start(config, directory / "start")
        disturbed = in_virtual_time(soak(config, directory / "churn", churn, prepared=start))
        calm = replace(churn, lifetime_rounds=None, max_tokens=disturbed.curve[-1][0])
        undisturbed = in_virtual_time(soak(config, directory / "calm", calm, prepared=start))
    figures = summary(disturbed, undisturbed)
    table = Table("figure", "value")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,.4g}")
    table.add_row("seconds", f"{time.monotonic() - begin:.0f}")
    console = Console()
    console.print(table)
    for problem in (*disturbed.missed, *disturbed.violations, *undisturbed.violations):
        console.print(f"! {problem}", markup=False)
    if json_file is not None:
        outcomes = {"churn": asdict(disturbed), "calm": asdict(undisturbed)}
        json_file.write_text(json.dumps({"summary": figures, **outcomes}, indent=1) + "\n")
    if (
        figures["violations"]
        or figures["commit_share"] < MIN_COMMIT_SHARE
        or figures["perplexity_ratio"] > MAX_PERPLEXITY_RATIO
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
