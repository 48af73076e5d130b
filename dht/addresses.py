"""Addresses of peers: multiaddrs such as `/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW…`.

Importing this module does not import hivemind, so that a command line can check what it was given.
"""

from __future__ import annotations

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from dht.errors import LocalFault
from dht.identity import public_key_of

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
