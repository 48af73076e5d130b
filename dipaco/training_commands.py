"""`dipaco train` and `dipaco train-router`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dipaco.command_line import Command
from dipaco.command_options import (
    compile_option,
    device_option,
    early_stopped_option,
    open_device,
    threads_option,
    trained_dir,
)
from dipaco.config import RunConfig
from dipaco.imports import heavy_imports, import_for_training

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from dipaco.reference import Options, ReferenceResult
    from dipaco.rounds import Evaluations, RoundReport
    from dipaco.start import Start
    from dipaco.topology import PathID


@click.command(cls=Command)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("work"),
    show_default=True,
    metavar="DIR",
    help="Where preparation and training are kept, and continued.",
)
@device_option
@threads_option
@compile_option
@click.option(
    "--replicas",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Train each path N times on different batches; with one path this is DiLoCo.",
)
@click.option(
    "--side-by-side",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Train N paths at once, which is what fills a GPU with small ones; a CPU takes turns.",
)
@click.option(
    "--early-stopping",
    is_flag=True,
    help="Also keep each path as it was when it did best, which is then what is used.",
)
@click.option(
    "--baseline",
    is_flag=True,
    help="Also train a dense model of one path's size, for as many steps as a path.",
)
def train(  # noqa: PLR0913 - one parameter per option
    config: Path,
    directory: Path,
    device_name: str,
    threads: int,
    compiled: bool,
    replicas: int,
    side_by_side: int,
    early_stopping: bool,
    baseline: bool,
) -> None:
    """Run the whole algorithm on this machine.

    CONFIG is a TOML file. Prepares the start of the run, trains every path in every round, and
    prints the perplexity of each path and of the whole model, and the digest of every module.
    Interrupted, it continues with the round it was in.
    """
    run = RunConfig.from_file(config)
    with heavy_imports():
        from rich.console import Console

        from dipaco.device import require_compiler
        from dipaco.locking import working_in
        from dipaco.preparation import check_sources, prepare_start
        from dipaco.progress import StageBars, progress_bars
        from dipaco.reference import Options

        import_for_training()

    device = open_device(device_name, threads)
    if compiled:
        require_compiler(device)
    options = Options(
        replicas=replicas,
        side_by_side=side_by_side,
        compiled=compiled,
        early_stopping=early_stopping,
    )
    # All along: what another configuration prepares takes the place of what this one trains on.
    with working_in(directory), progress_bars(Console(stderr=True)) as progress:
        check_sources(run, directory)
        start = prepare_start(run, directory, StageBars(progress).update, device=device)
        result, dense = _train(start, progress, device, options, baseline)
    _print_tables(start, result, dense)


def _train(
    start: "Start",
    progress: "Progress",
    device: "torch.device",
    options: "Options",
    baseline: bool,
) -> "tuple[ReferenceResult, Evaluations | None]":
    from dipaco import reference
    from dipaco.dense import evaluate_dense, train_dense
    from dipaco.rounds import latest_round
    from dipaco.trained import training_directory

    rounds = start.config.rounds
    directory = training_directory(start.directory, start.config)
    done = latest_round(directory, start.config)
    num_done = done.number if done else 0
    if num_done:
        progress.console.print(f"continuing after round {num_done} in {directory}", soft_wrap=True)
    paths_per_round = rounds.paths_per_round or start.topology.num_paths
    steps_per_round = rounds.inner_steps * paths_per_round * options.replicas
    task = progress.add_task(
        "train", total=rounds.num_rounds * steps_per_round, completed=num_done * steps_per_round
    )

    def on_step(path: "PathID", position: int) -> None:
        number = f"round {position // rounds.inner_steps + 1}/{rounds.num_rounds}"
        progress.update(task, advance=1, description=f"{number}  path {path}")

    def on_round(report: "RoundReport") -> None:
        progress.console.print(_line_of(report), highlight=False, soft_wrap=True)

    result = reference.train(
        start,
        directory,
        num_rounds=rounds.num_rounds,
        device=device,
        options=options,
        on_step=on_step,
        on_round=on_round,
    )
    if not baseline:
        return result, None
    num_steps = reference.max_turns(start.config, start.topology) * rounds.inner_steps
    task = progress.add_task("dense", total=num_steps)
    dense = train_dense(
        start, num_steps, device=device, on_step=lambda step: progress.advance(task)
    )
    return result, evaluate_dense(result.sharding, dense)


_MANY_PATHS = 8  # more do not fit on a line


def _line_of(report: "RoundReport") -> str:
    """A round in one line."""
    from dipaco.evaluate import total

    perplexity = total(report.evaluations).perplexity
    losses = list(report.losses.items())
    shown = "  ".join(f"{path} {loss:.3f}" for path, loss in losses[:_MANY_PATHS])
    more = "  ..." if len(losses) > _MANY_PATHS else ""
    ratios = report.norm_ratios.values()
    return (
        f"round {report.round}  perplexity {perplexity:.2f}  "
        f"norm ratio {min(ratios):.2f} to {max(ratios):.2f}  loss of path {shown}{more}"
    )


def _print_tables(start: "Start", result: "ReferenceResult", dense: "Evaluations | None") -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from dipaco.evaluate import total

    console = Console()
    columns = {"start": result.at_start, "end": result.at_end}
    if dense is not None:
        columns["dense"] = dense
    scored, shard_tokens = columns.values(), result.sharding.shard_tokens
    table = Table("path", "shard tokens", *columns, title="validation perplexity")
    for path in start.topology.paths:
        cells = [
            f"{evaluations[path].perplexity:.2f}" if evaluations[path].num_tokens else "-"
            for evaluations in scored
        ]
        table.add_row(str(path), f"{shard_tokens[path]:,}", *cells)
    table.add_section()
    cells = [f"{total(evaluations).perplexity:.2f}" for evaluations in scored]
    table.add_row("all", f"{sum(shard_tokens.values()):,}", *cells)
    console.print(table)
    # Folded, not cut: a digest is data.
    modules = Table("module", "blocks", Column("digest", overflow="fold"), title="modules")
    for module, digest in result.digests.items():
        blocks = start.topology.blocks_of(module)
        held = f"{blocks[0]}-{blocks[-1]}" if blocks else "embedding"
        modules.add_row(str(module), held, digest)
    console.print(modules)


@click.command("train-router", cls=Command)
@trained_dir
@click.option(
    "--steps", type=click.IntRange(1), default=500, show_default=True, help="Training steps."
)
@early_stopped_option
@device_option
@threads_option
def train_router(
    directory: Path, steps: int, early_stopped: bool | None, device_name: str, threads: int
) -> None:
    """Train the token-level router of a trained model, for re-routing within a sequence.

    DIR is what `dipaco train --dir` filled. Scores the router data under every path, one after
    another, and fine-tunes the dense start to tell at any token which path will do best. Needs
    routing.router_fraction above 0 in the configuration. Choose between --early-stopped and --last
    as you will when you use it.
    """
    with heavy_imports():
        from rich.console import Console

        from dipaco.progress import StageBars, progress_bars
        from dipaco.trained import TrainedModel, train_token_router_of

        import_for_training()

    device = open_device(device_name, threads)
    model = TrainedModel.load(directory, device)
    with progress_bars(Console(stderr=True)) as progress:
        train_token_router_of(model, steps, StageBars(progress).update, early_stopped=early_stopped)
    click.echo(f"token-level router for {model.config.topology.num_paths} paths is in {directory}")
