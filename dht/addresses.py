"""Addresses of peers, read: multiaddrs such as `/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW…`.

Importing this module does not import hivemind, so that a command line can check what it was given.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import TYPE_CHECKING

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from dht.errors import LocalFault
from dht.identity import public_key_of

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MADDR_CHARACTERS = 1024


def split_maddr(maddr: str) -> tuple[str, str]:
    """(where to dial, peer ID to expect there) of an address; `LocalFault` if it is none."""
    where, found, peer_id = maddr.strip().rpartition("/p2p/")
    try:
        if not found or len(maddr) > MAX_MADDR_CHARACTERS:
            raise ValueError("it must end in /p2p/ and a peer ID")
        public_key_of(peer_id)
        protocols = {protocol.name for protocol in Multiaddr(where).protocols()}
        if not protocols & {"tcp", "p2p-circuit"}:
            raise ValueError("it names no TCP port")
    except (MultiaddrError, ValueError) as e:
        raise LocalFault(
            f"`{maddr[:MAX_MADDR_CHARACTERS]}` is not the address of a peer: {e}",
            hint="an address looks like /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW…",
        ) from e
    return where, peer_id


def peer_of(maddr: str) -> str:
    """The peer ID that an address ends in; `LocalFault` if it is none."""
    return split_maddr(maddr)[1]


def is_circuit(maddr: str) -> bool:
    """Whether an address leads through a relay."""
    return "/p2p-circuit" in maddr


def ports_of(maddrs: Sequence[str]) -> tuple[int, ...]:
    """The TCP ports in addresses, each once; those of relays are not among them."""
    direct = [maddr for maddr in maddrs if not is_circuit(maddr)]
    ports = [int(port) for maddr in direct for port in re.findall(r"/tcp/(\d{1,5})", maddr)]
    return tuple(dict.fromkeys(port for port in ports if 0 < port < 2**16))


def host_of(maddrs: Sequence[str]) -> str | None:
    """The IP address, as `/ip4/…`, that a peer is seen at; None if only through a relay."""
    for maddr in maddrs:
        found = re.match(r"/ip[46]/[0-9a-fA-F:.]+", maddr)
        if found and not is_circuit(maddr):
            return found[0]
    return None


def outside(maddrs: Sequence[str]) -> list[str]:
    """Those that lead here from other machines; all of them if none does."""
    return [maddr for maddr in maddrs if not is_loopback(maddr)] or list(maddrs)


def is_loopback(maddr: str) -> bool:
    """Whether an address leads to this machine only."""
    return maddr.startswith(("/ip4/127.", "/ip6/::1/"))


def is_global(maddr: str) -> bool:
    """Whether an address leads anywhere from everywhere: a public one, or a name.

    Private, loopback and link-local ones do not, nor those that providers share out (100.64/10).
    """
    found = re.match(r"/ip[46]/([^/]+)", maddr)
    try:
        return found is None or ip_address(found[1]).is_global
    except ValueError:
        return False
