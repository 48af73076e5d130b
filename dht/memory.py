"""The in-memory twin of `dht.kademlia`, for simulations under a virtual clock.

Records really are encoded, signed, verified and decoded. The clock is the running loop's.
A partition hides records from readers on the other side, and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dht.errors import Unreachable
from dht.records import encode
from dht.storage import RecordStorage
from dht.swarm import WITHDRAWAL_SECONDS, choose_expiration_time, readable
from dht.validation import key_id

if TYPE_CHECKING:
    from collections.abc import Collection

    from dht.identity import Identity
    from dht.records import Record
    from dht.storage import Entry

EPOCH_TIME = 1_700_000_000.0  # the swarm's clock when the loop's clock reads zero


class MemoryDHT:
    """What all `MemorySwarm`s of a simulation share: one storage, as if every node held all."""

    def __init__(self, *, latency_seconds: float = 0.0) -> None:
        self.latency_seconds = latency_seconds
        self._storage = RecordStorage(now, max_bytes=2**40, max_peer_bytes=2**40)
        self._cut: set[frozenset[str]] = set()

    def partition(self, left: Collection[str], right: Collection[str]) -> None:
        """Let no peer ID on one side see the records of the other side."""
        self._cut |= {frozenset((a, b)) for a in left for b in right if a != b}

    def heal(self) -> None:
        """End every partition."""
        self._cut.clear()

    def put(self, key: str, subkey: str, raw: bytes, expiration_time: float) -> bool:
        """Keep `raw` unless what is there expires later."""
        return self._storage.store(key_id(key), subkey, raw, expiration_time)

    def get(self, key: str, reader: str) -> dict[str, Entry]:
        """What `reader` finds under `key`."""
        entries = self._storage.get(key_id(key))
        return {s: entry for s, entry in entries.items() if frozenset((reader, s)) not in self._cut}


def now() -> float:
    """The clock of the nodes of a `MemoryDHT`: that of the running loop."""
    return EPOCH_TIME + asyncio.get_running_loop().time()


class MemorySwarm:
    """`dht.swarm.Swarm` on a `MemoryDHT`, for a peer whose clock is off by `clock_skew_seconds`."""

    def __init__(
        self, dht: MemoryDHT, identity: Identity, *, clock_skew_seconds: float = 0.0
    ) -> None:
        self._dht = dht
        self._identity = identity
        self.clock_skew_seconds = clock_skew_seconds
        self._is_closed = False

    @property
    def peer_id(self) -> str:
        """See `Swarm`."""
        return self._identity.peer_id

    def now(self) -> float:
        """See `Swarm`."""
        return now() + self.clock_skew_seconds

    async def store(self, record: Record, lifetime_seconds: float) -> bool:
        """See `Swarm`."""
        await self._travel()
        _, previous_time = self._own_entry(record.key)
        expiration_time = choose_expiration_time(self.now(), lifetime_seconds, previous_time)
        raw = encode(record, self._identity, expiration_time)
        return self._dht.put(record.key, self.peer_id, raw, expiration_time)

    async def read(self, key: str) -> list[Record]:
        """See `Swarm`."""
        await self._travel()
        entries = self._dht.get(key, self.peer_id)
        return readable(entries, key=key, reader=self.peer_id, now=self.now())

    async def withdraw(self, record: Record) -> None:
        """See `Swarm`."""
        withdrawal = record.model_copy(update={"withdrawn": True})
        await self.store(withdrawal, WITHDRAWAL_SECONDS)

    async def close(self) -> None:
        """See `Swarm`."""
        self._is_closed = True

    async def _travel(self) -> None:
        if self._is_closed:
            raise Unreachable("this peer has left the swarm")
        await asyncio.sleep(self._dht.latency_seconds)

    def _own_entry(self, key: str) -> Entry:
        entries = self._dht.get(key, self.peer_id)
        return entries.get(self.peer_id, (b"", float("-inf")))
