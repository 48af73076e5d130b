"""`dipaco-peer`: join a swarm, look at it, or check that this machine could.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipaco.command_line import CONTEXT_SETTINGS, CommandLine
from dipaco.command_options import compile_option, early_stopped_option
from dipaco.imports import heavy_imports
from peer.command_options import (
    limit_options,
    maddr_argument,
    network_options,
    state_dir_option,
    volunteer_options,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from peer.check import Finding


@click.group(cls=CommandLine, context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="dipaco")
def main() -> None:
    """Train one language model together with strangers, on whatever GPU or CPU you have.

    \b
    Example:
      dipaco-peer join /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
    """


@main.command()
@maddr_argument
@state_dir_option("Identity, blobs and checkpoints; one directory for each peer.")
@network_options
@limit_options
@volunteer_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@compile_option
@click.option(
    "--optimizer",
    type=click.Choice(["auto", "adamw", "adamw8bit"]),
    default="auto",
    show_default=True,
    help="Inner optimizer; auto takes 8-bit AdamW only when GPU memory is short, and says so.",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", count=True, help="More detail; -vv adds tracebacks.")
def join(address: tuple[str, ...], quiet: bool, verbose: int, **options: Any) -> None:
    """Join the run that ADDRESS belongs to, and train one path of its model.

    Ctrl-C leaves in good order; a second Ctrl-C leaves at once. With the same --state-dir you
    continue where you left off.
    """
    with heavy_imports():
        from peer.display import Display
        from peer.join import join as join_run

    asyncio.run(join_run(_config(address, **options), Display(quiet=quiet, verbosity=verbose)))


@main.command()
@maddr_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", count=True, help="-vv adds tracebacks.")
def status(address: tuple[str, ...], as_json: bool, verbose: int) -> None:
    """Show the swarm that ADDRESS belongs to: peers, paths, rounds, versions, digests."""
    with heavy_imports():
        from rich.console import Console

        from peer.observe import observe
        from peer.status import status_tables

    seen = asyncio.run(observe(address))
    if as_json:
        click.echo(json.dumps(seen.to_dict(), indent=2))
        return
    for table in status_tables(seen):
        Console().print(table)
    if seen.perplexity is not None:
        num_measured, num_paths = len(seen.measured_paths), seen.num_paths
        of_what = f"{num_measured} of {num_paths} paths"
        of_what = "whole model" if num_measured == num_paths else of_what
        click.echo(f"{of_what}: validation perplexity {seen.perplexity:.2f}")


@main.command()
@maddr_argument
@state_dir_option("Identity, blobs and checkpoints; one directory for each peer.")
@network_options
@limit_options
@volunteer_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@compile_option
@click.option("-v", "--verbose", count=True, help="-vv adds tracebacks.")
def check(address: tuple[str, ...], verbose: int, **options: Any) -> None:
    """Dry run: clock, addresses, disk, open files, device, each with its fix."""
    with heavy_imports():
        from peer.check import run_checks

    asyncio.run(_print_checks(run_checks(_config(address, **options))))


@main.command()
@click.argument("path_name", metavar="PATH")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path), metavar="TARGET")
@state_dir_option("Of a volunteer or a bootstrap node.")
@click.option(
    "--run", default="", help="Beginning of the run's name, if the directory has several."
)
@early_stopped_option
def export(
    path_name: str, target: Path, state_dir: Path | None, run: str, early_stopped: bool | None
) -> None:
    """Write a path as a model directory for the `transformers` library.

    PATH is one that this machine's peer holds, such as 0.1: it may be running. TARGET is a
    directory that is empty or not there; it gets configuration, weights and tokenizer. The path
    that the peer has trained last is taken as it did best there, others as they are.
    """
    with heavy_imports():
        from dipaco.llama import export_llama
        from peer.config import default_state_dir
        from peer.export import RunOnDisk

    found = RunOnDisk(state_dir or default_state_dir(), run).path(
        path_name, early_stopped=early_stopped
    )
    export_llama(found.net, found.tokenizer, target)
    when = ", where it did best here," if found.is_early_stopped else ""
    click.echo(f"path {path_name} after round {found.round}{when} is in {target}")


@main.command()
@state_dir_option("Where the identity lies.")
def identity(state_dir: Path | None) -> None:
    """Print this machine's peer ID; make one if there is none. Never prints the key."""
    from dht.identity import Identity
    from peer.config import default_state_dir

    directory = state_dir or default_state_dir()
    directory.mkdir(parents=True, exist_ok=True)
    click.echo(Identity.load_or_create(directory / "identity").peer_id)


async def _print_checks(findings: "AsyncIterator[Finding]") -> None:
    failed = False
    async for finding in findings:
        failed = failed or not finding.ok
        click.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.text}")
        if finding.fix:
            click.echo(f"      hint: {finding.fix}")
    if failed:
        raise SystemExit(1)


def _config(address: tuple[str, ...], **options: Any) -> Any:  # noqa: ANN401
    """A `PeerConfig` from options; those not given keep their defaults."""
    from peer.config import PeerConfig

    if options["client_mode"] and options["relay_service"]:
        raise click.UsageError("--client-mode and --relay-service exclude each other")
    if options["max_mbps"] is not None and options["relay_service"]:
        raise click.UsageError("--max-mbps does not hold for what --relay-service relays: take one")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return PeerConfig(initial_peers=address, **given)
