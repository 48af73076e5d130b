"""What the commands of a peer have in common: arguments and options, checked as they are read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dht.errors import LocalFault

T = TypeVar("T")

SIZE_UNITS = {unit: 1000 ** (power + 1) for power, unit in enumerate("kmgt")}


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


def state_dir_option(what: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """The option that names a peer's state directory; `what` says what of it is used."""
    return click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help=what)


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
