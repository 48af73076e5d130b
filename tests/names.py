"""Peer IDs for tests in which peers have names."""

import hashlib
from functools import cache

from dht.identity import Identity


@cache
def peer_named(name: str) -> str:
    """The peer ID of whoever has that name."""
    return Identity(hashlib.sha256(name.encode()).digest()).peer_id
