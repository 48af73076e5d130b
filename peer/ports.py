"""The port that a peer listens on: the same one after a restart, so that others find it again."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dht.addresses import ports_of
from dht.daemon import check_ports
from dht.errors import LocalFault

_ANY_PORT = "/tcp/0"


def as_before(host_maddrs: Sequence[str], address_file: Path) -> tuple[str, ...]:
    """`host_maddrs`, with the port that this peer had the last time where any will do.

    `address_file` is where it left its addresses then. Unchanged if it left none, if the port is
    taken now, or if it listens on more than one address.
    """
    match list(host_maddrs):
        case [maddr] if maddr.endswith(_ANY_PORT):
            before = _ports_in(address_file)
            if len(before) == 1:
                chosen = (maddr.removesuffix(_ANY_PORT) + f"/tcp/{before[0]}",)
                with suppress(LocalFault):
                    check_ports(chosen)
                    return chosen
    return tuple(host_maddrs)


def _ports_in(address_file: Path) -> tuple[int, ...]:
    try:
        return ports_of(address_file.read_text().split())
    except (OSError, ValueError):
        return ()
