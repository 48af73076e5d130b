"""`dipaco`: the commands of a researcher. Each parses, calls one function, and prints.

torch is imported inside the commands, so that `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dipaco.config import RunConfig
from dipaco.errors import ConfigError, DipacoError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from dipaco.reference import Evaluations, ReferenceResult, RoundReport
    from dipaco.start import Start
    from dipaco.topology import PathID

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "DIPACO"}
_INTERRUPTED = 130  # what shells report for Ctrl-C


def main() -> None:
    """Entry point: every expected failure is one line and a hint; exit 1, or 2 for usage."""
    try:
        sys.exit(cli(prog_name="dipaco", standalone_mode=False))
    except click.Abort:
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DipacoError as error:
        _fail(str(error), error.hint)
    except OSError as error:
        _fail(
            f"{error.filename or 'file'}: {error.strerror or error}", "check space and permissions"
        )


def _fail(message: str, hint: str) -> None:
    click.echo(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""), err=True)
    sys.exit(1)


@click.group(context_settings=_CONTEXT)
def cli() -> None:
    """Train a DiPaCo on one machine."""


@cli.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("work"),
    show_default=True,
    metavar="DIR",
    help="Where the preparation is kept, and found again, and the result is written.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    metavar="N",
    help="CPU threads of torch. The last bits of a result depend on it.",
)
@click.option(
    "--baseline",
    is_flag=True,
    help="Also train a dense model of one path's size for as many steps.",
)
def train(config: Path, directory: Path, device: str, threads: int, baseline: bool) -> None:
    """Run the whole algorithm on this machine.

    CONFIG is a TOML file. Prepares the start of the run, trains every path in every round, and
    prints the perplexity of each path and of the whole model, and the digest of every module.
    """
    try:
        run = RunConfig.from_toml(config.read_text())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{config} is not a text file") from error

    import torch
    from rich.console import Console

    from dipaco.checkpoint import encode_state, write_atomically
    from dipaco.device import find_device
    from dipaco.preparation import prepare_start
    from dipaco.progress import StageBars, progress_bars

    torch.set_num_threads(threads)
    torch_device = find_device(device)
    with progress_bars(Console(stderr=True)) as progress:
        start = prepare_start(run, directory, StageBars(progress).update, device=torch_device)
        result, dense = _train(start, progress, torch_device, baseline)
    final_dir = directory / "final"
    final_dir.mkdir(exist_ok=True)
    for module, state in result.states.items():
        write_atomically(final_dir / f"{module}.safetensors", encode_state(state))
    _print_tables(start, result, dense)


def _train(
    start: "Start", progress: "Progress", device: "torch.device", baseline: bool
) -> "tuple[ReferenceResult, Evaluations | None]":
    from dipaco import reference

    rounds = start.config.rounds
    total_steps = rounds.total_steps * start.topology.num_paths
    task = progress.add_task("train", total=total_steps)

    def on_step(path: "PathID", position: int) -> None:
        number = f"round {position // rounds.inner_steps + 1}/{rounds.num_rounds}"
        progress.update(task, advance=1, description=f"{number}  path {path}")

    def on_round(report: "RoundReport") -> None:
        losses = "  ".join(f"{path} {loss:.3f}" for path, loss in report.losses.items())
        perplexity = reference.total(report.evaluations).perplexity
        progress.console.print(
            f"round {report.round + 1}  perplexity {perplexity:.2f}  loss of path {losses}",
            highlight=False,
            soft_wrap=True,
        )

    result = reference.train(
        start, num_rounds=rounds.num_rounds, device=device, on_step=on_step, on_round=on_round
    )
    if not baseline:
        return result, None
    task = progress.add_task("dense", total=rounds.total_steps)
    dense = reference.train_dense(
        start, rounds.total_steps, device=device, on_step=lambda step: progress.advance(task)
    )
    return result, dense


def _print_tables(start: "Start", result: "ReferenceResult", dense: "Evaluations | None") -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from dipaco.reference import total

    console = Console()
    columns = {"start": result.at_start, "end": result.at_end}
    if dense is not None:
        columns["dense"] = dense
    scored = columns.values()
    table = Table("path", "shard tokens", *columns, title="validation perplexity")
    for path in start.topology.paths:
        cells = [f"{evaluations[path].perplexity:.2f}" for evaluations in scored]
        table.add_row(str(path), f"{start.shard_tokens[path]:,}", *cells)
    table.add_section()
    cells = [f"{total(evaluations).perplexity:.2f}" for evaluations in scored]
    table.add_row("all", f"{sum(start.shard_tokens.values()):,}", *cells)
    console.print(table)
    # Folded, not cut: a digest is data.
    modules = Table("module", "blocks", Column("digest", overflow="fold"), title="modules")
    for module, digest in result.digests.items():
        blocks = start.topology.blocks_of(module)
        held = f"{blocks[0]}-{blocks[-1]}" if blocks else "embedding"
        modules.add_row(str(module), held, digest)
    console.print(modules)
