"""What the command lines have in common: address arguments, one-line errors, exit codes.

Exit 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one line, an empty line and a
hint; a traceback is shown only with `-vv`.
"""

import asyncio
import errno
import functools
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from dht.errors import LocalFault, SwarmError
from dipaco.errors import DipacoError
from dipaco.imports import INTERRUPTED

T = TypeVar("T")

SIZE_UNITS = {unit: 1000 ** (power + 1) for power, unit in enumerate("kmgt")}

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "DIPACO",
    "max_content_width": 100,
}


class MaddrType(click.ParamType[str]):
    """A peer's multiaddr, checked with py-multiaddr."""

    name = "multiaddr"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address as it was typed; fails with what one looks like."""
        from dht.addresses import split_maddr

        try:
            split_maddr(value)
        except LocalFault as error:
            self.fail(f"{error}\n\nhint: {error.hint}", param, ctx)
        return value.strip()


class ListenMaddrType(click.ParamType[str]):
    """An address to listen on or to announce: `/ip4/…/tcp/…`, without a peer ID."""

    name = "multiaddr"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address as it was typed; fails with what one looks like."""
        from multiaddr import Multiaddr
        from multiaddr.exceptions import Error as MultiaddrError

        try:
            names = {protocol.name for protocol in Multiaddr(value).protocols()}
            if "tcp" not in names:
                raise ValueError("it names no TCP port")
        except (MultiaddrError, ValueError) as error:
            self.fail(
                f"`{value}` is not an address to listen on: {error}\n\n"
                "hint: an address looks like /ip4/0.0.0.0/tcp/31337",
                param,
                ctx,
            )
        return value


class SizeType(click.ParamType[int]):
    """A number of bytes: `20`, `20GB`, `512 MB`; without a unit, gigabytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """The size in bytes; fails with what one looks like."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:([kmgt])i?b?)?", value.strip().lower())
        num_bytes = round(float(match[1]) * SIZE_UNITS[match[2] or "g"]) if match else 0
        if num_bytes <= 0:
            self.fail(
                f"`{value}` is not a size\n\nhint: a size looks like 20GB, 512MB or 1.5TB; "
                "a number alone is in GB",
                param,
                ctx,
            )
        return num_bytes


maddr_argument = click.argument(
    "address", nargs=-1, required=True, type=MaddrType(), metavar="ADDRESS..."
)


def network_options(command: Callable[..., T]) -> Callable[..., T]:
    """Options of every command that runs a peer."""
    for option in (
        click.option(
            "--announce-maddr",
            "announce_maddrs",
            multiple=True,
            type=ListenMaddrType(),
            help="Address that others are told, if it differs (port forwarding).",
        ),
        click.option(
            "--host-maddr",
            "host_maddrs",
            multiple=True,
            type=ListenMaddrType(),
            help="Address to listen on.  [default: /ip4/0.0.0.0/tcp/0]",
        ),
        click.option(
            "--state-dir",
            type=click.Path(file_okay=False, path_type=Path),
            help="Identity, blobs and checkpoints; for `serve`, DIRECTORY itself by default.",
        ),
        click.option(
            "--max-mbps",
            type=click.FloatRange(min=1),
            metavar="N",
            help="Send at most N Mbit/s, and receive at most as much.  [default: no limit]",
        ),
    ):
        command = option(command)
    return command


def limit_options(command: Callable[..., T]) -> Callable[..., T]:
    """Options of every command that takes, or would take, a path."""
    for option in (
        click.option(
            "--memory-limit",
            "memory_limit_bytes",
            type=SizeType(),
            help="Memory to use, e.g. 8GB; no path that needs more is taken.  [default: no limit]",
        ),
        click.option(
            "--disk-limit",
            "disk_limit_bytes",
            type=SizeType(),
            help="Disk to use, e.g. 20GB; what is kept for others comes last.  [default: no limit]",
        ),
    ):
        command = option(command)
    return command


def volunteer_options(command: Callable[..., T]) -> Callable[..., T]:
    """Options of a volunteer's way to be reached."""
    command = click.option(
        "--relay-service",
        is_flag=True,
        help="Relay for volunteers that cannot be dialled; for machines that can be.",
    )(command)
    return click.option(
        "--client-mode",
        is_flag=True,
        help="Listen nowhere; be reached only by those you dial, and through relays.",
    )(command)


def one_line_errors(command: Callable[..., T]) -> Callable[..., T]:
    """Turn what this project raises on purpose into one line and a hint, exit 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> T:
        try:
            return command(*args, **options)
        except* (SwarmError, DipacoError) as group:
            error = _first(group)
            _fail(str(error), getattr(error, "hint", ""), error, options)
        except* OSError as group:
            error = _first(group)
            _fail(*_explain(error), error, options)
        except* _out_of_device_memory() as group:
            error = _first(group)
            _fail(*_explain_device_memory(options), error, options)
        except* KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        raise AssertionError("unreachable: every branch above exits")

    return wrapped


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; exit 130 if it is interrupted before it handles that itself."""
    try:
        return asyncio.run(coroutine)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _fail(message: str, hint: str, error: BaseException, options: dict[str, Any]) -> None:
    if options.get("verbose", 0) > 1:
        raise error
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"\nhint: {hint}", err=True)
    raise SystemExit(1)


def _first(group: BaseExceptionGroup[Any]) -> Any:  # noqa: ANN401
    """The first leaf of an exception group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _out_of_device_memory() -> Any:  # noqa: ANN401
    """What torch raises then; nothing if it was not imported, for which `--help` cannot wait."""
    return getattr(sys.modules.get("torch"), "OutOfMemoryError", ())


def _explain_device_memory(options: dict[str, Any]) -> tuple[str, str]:
    hint = "another program may have taken it; start the same command again when it is free"
    if "optimizer" in options:
        hint += ", with the same `--state-dir`; `--optimizer adamw8bit` needs less"
    return "the memory of the device is full", hint


def _explain(error: OSError) -> tuple[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the disk is full; nothing that was written is lost",
            "free some space and start the same command again",
        )
    where = f" (`{error.filename}`)" if error.filename else ""
    return f"{error.strerror or error}{where}", ""
