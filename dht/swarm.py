"""The swarm as the rest of the program sees it: a memory of signed records that expire.

Two implementations keep this promise: `dht.kademlia` over libp2p, and the twin `dht.memory`.
What they must decide alike is decided here, in pure functions.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from dht.errors import BadRecord
from dht.records import MAX_CLOCK_SKEW_SECONDS, MAX_LIFETIME_SECONDS, decode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dht.records import Record

MAX_SUBKEYS = 256  # peers kept, and considered, under one key; a reader samples when there are more
WITHDRAWAL_SECONDS = 10.0  # a withdrawal outlives the record it replaces, and at least this long
_LATER_SECONDS = 0.001  # by which a replacement outlives what it replaces


class Swarm(Protocol):
    """One peer's access to the records of all peers."""

    @property
    def peer_id(self) -> str:
        """Who stores: the subkey of every record this peer writes."""

    def now(self) -> float:
        """The swarm's common clock, Unix seconds."""

    async def store(self, record: Record, lifetime_seconds: float) -> bool:
        """Publish our `record` for `lifetime_seconds`, in place of our previous one at its key.

        Returns whether the swarm took it; when it did not, try again later. It may live a little
        longer than asked, because only what expires later replaces what is there.
        """

    async def read(self, key: str) -> list[Record]:
        """The valid, unexpired, not withdrawn records under `key`, freshly read, by peer ID.

        At most `MAX_SUBKEYS` peers are considered. Empty when there is none, or no answer.
        """

    async def withdraw(self, record: Record) -> None:
        """Take back our record at `record`'s key, as far as the swarm can be reached."""

    async def close(self) -> None:
        """Leave. Does nothing the second time."""


def choose_expiration_time(now: float, lifetime_seconds: float, previous_time: float) -> float:
    """When a record stored `now` expires, given when the one it must replace expires.

    Raises ValueError if the lifetime is out of range: that is our fault.
    """
    if not 0 < lifetime_seconds <= MAX_LIFETIME_SECONDS:
        raise ValueError(
            f"a record lives between 0 and {MAX_LIFETIME_SECONDS:.0f} s, not {lifetime_seconds}"
        )
    latest_time = now + MAX_LIFETIME_SECONDS + MAX_CLOCK_SKEW_SECONDS / 2
    return min(max(now + lifetime_seconds, previous_time + _LATER_SECONDS), latest_time)


def readable(
    entries: Mapping[str, tuple[bytes, float]], *, key: str, reader: str, now: float
) -> list[Record]:
    """The records that `reader` believes among `entries` (peer ID -> bytes, expiration time).

    When too many peers claim to be there, each reader looks at its own sample of them, so that
    made-up peers cannot hide all others from everyone.
    """
    peers = sorted(entries)
    if len(peers) > MAX_SUBKEYS:
        peers.sort(key=lambda peer: hashlib.sha256(f"{reader}/{peer}".encode()).digest())
        peers = sorted(peers[:MAX_SUBKEYS])
    records = []
    for peer in peers:
        raw, expiration_time = entries[peer]
        try:
            record = decode(raw, key=key, subkey=peer, expiration_time=expiration_time, now=now)
        except BadRecord:
            continue  # every node on the way refuses it too: not worth a word
        if not record.withdrawn:
            records.append(record)
    return records
