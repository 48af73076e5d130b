"""The port that a peer listens on: the same one after a restart, so that others find it again.

It has a file of its own, since the addresses of a peer need not name it: behind a relay they do
not, and what a router forwards may be another one.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dht.addresses import ports_of
from dht.daemon import check_ports
from dht.errors import LocalFault
from dipaco.checkpoint import write_atomically

_ANY_PORT = "/tcp/0"


def as_before(host_maddrs: Sequence[str], port_file: Path) -> tuple[str, ...]:
    """`host_maddrs`, with the port that this peer had the last time where any will do.

    Unchanged if `keep_port` left none in `port_file`, if the port is taken now, or if it listens on
    more than one address.
    """
    match list(host_maddrs):
        case [maddr] if maddr.endswith(_ANY_PORT):
            chosen = (f"{maddr.removesuffix(_ANY_PORT)}/tcp/{_port_in(port_file)}",)
            with suppress(LocalFault):
                check_ports(chosen)
                return chosen
    return tuple(host_maddrs)


def keep_port(listening: Sequence[str], port_file: Path) -> None:
    """Leave the port that this peer listens on to `as_before`, if it is one."""
    ports = ports_of(listening)
    if len(ports) == 1:
        with suppress(OSError):  # then it is another one the next time
            write_atomically(port_file, f"{ports[0]}\n".encode())


def _port_in(port_file: Path) -> int:
    """The port in that file; 0, which is any, if there is none."""
    try:
        port = int(port_file.read_text())
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 2**16 else 0
