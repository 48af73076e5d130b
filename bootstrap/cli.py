"""`dipaco-bootstrap`: prepare a run, be its first peer, look at it.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

import asyncio
from pathlib import Path
from typing import Any

import click

from dipaco.command_line import CONTEXT_SETTINGS, CommandLine
from dipaco.imports import heavy_imports, import_for_training
from peer.cli import status
from peer.command_options import network_options


@click.group(cls=CommandLine, context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="dipaco")
def main() -> None:
    """Start a run that strangers can join, and serve it until it can do without you.

    \b
    Example:
      dipaco-bootstrap prepare examples/tiny.toml my-run
      dipaco-bootstrap serve my-run --host-maddr /ip4/0.0.0.0/tcp/31337
    """


main.add_command(status)


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("-v", "--verbose", count=True, help="-vv adds tracebacks.")
def prepare(
    config: Path,
    directory: Path,
    threads: int | None,
    device: str,
    verbose: int,
) -> None:
    """Turn the corpus that CONFIG names into a run in DIRECTORY.

    Tokenizer, dense start, router, shards. Interrupted, it continues where it was.
    """
    with heavy_imports():
        import torch
        from rich.console import Console

        from bootstrap.prepare import prepare_run
        from dipaco.config import RunConfig
        from dipaco.device import find_device
        from dipaco.locking import working_in
        from dipaco.progress import StageBars, progress_bars

        import_for_training()

    if threads is not None:
        torch.set_num_threads(threads)
    run = RunConfig.from_file(config)
    with working_in(directory), progress_bars(Console(stderr=True)) as progress:
        prepare_run(run, directory, StageBars(progress).update, device=find_device(device))
    click.echo(f"next: dipaco-bootstrap serve {directory}")


class LevelsType(click.ParamType[tuple[int, ...]]):
    """Numbers of experts, separated by commas."""

    name = "levels"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers; fails with what they look like."""
        try:
            return tuple(int(number) for number in value.split(","))
        except ValueError:
            self.fail(f"`{value}` is not a list of numbers such as 2,2", param, ctx)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--levels",
    type=LevelsType(),
    required=True,
    metavar="N,N,...",
    help="Modules of each level: as many levels as there are, none smaller.",
)
@click.option("-v", "--verbose", count=True, help="-vv adds tracebacks.")
def grow(directory: Path, levels: tuple[int, ...], verbose: int) -> None:
    """Give the levels of the run in DIRECTORY more modules.

    The node that serves the run does it while the swarm trains: a new module begins as a copy of
    one that exists, and the corpus is sharded anew.
    """
    with heavy_imports():
        from bootstrap.growth import request_growth
        from bootstrap.prepare import newest_manifest
        from peer.succession import grown

    grown(newest_manifest(directory).run_config, levels)
    request_growth(directory, levels)
    click.echo(f"next: `dipaco-bootstrap serve {directory}` does it, running or started later")


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@network_options
@click.option(
    "--start-in",
    type=click.FloatRange(0, 1e7),
    metavar="SECONDS",
    help="When slot 0 begins, counted from the first time the run is served.  [default: 0]",
)
@click.option(
    "--relay-service/--no-relay-service",
    default=True,
    show_default=True,
    help="Relay for volunteers that cannot be dialled; never with --max-mbps.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", count=True, help="More detail; -vv adds tracebacks.")
def serve(
    directory: Path, start_in: float | None, quiet: bool, verbose: int, **options: Any
) -> None:
    """Be the first address and the first seeder of the run in DIRECTORY.

    Prints the lines to hand to volunteers. Ctrl-C leaves in good order; the run goes on without
    this node as long as volunteers are there.
    """
    with heavy_imports():
        from bootstrap.node import serve as serve_run
        from peer.config import PeerConfig
        from peer.display import Display

    given = {name: value for name, value in options.items() if value not in (None, ())}
    config = PeerConfig(state_dir=directory, **given)
    display = Display(quiet=quiet, verbosity=verbose)
    asyncio.run(serve_run(config, display, start_in=start_in))
