"""What one node of the DHT keeps for others: bounded, and gone when it expires.

One rule: a write that is refused changes nothing. (In hivemind's own storage a refused,
shorter-lived write makes the live record expire early: anyone could delete anything.)
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from dht.swarm import MAX_SUBKEYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_STORED_BYTES = 64 * 2**20  # in all; a record is a few hundred bytes
MAX_PEER_BYTES = 4 * 2**20  # of these, under one subkey, which is whoever signed them
ENTRY_BYTES = 512  # counted per record beside its value, for what Python needs to hold it

Entry = tuple[bytes, float]
"""A value and its expiration time."""


class RecordStorage:
    """Dictionaries (subkey -> value, expiration time) by key.

    When it is full it refuses: whoever was there first, and renews in time, stays.
    """

    def __init__(
        self,
        now: Callable[[], float],
        *,
        max_bytes: int = MAX_STORED_BYTES,
        max_peer_bytes: int = MAX_PEER_BYTES,
    ) -> None:
        self._now = now
        self._max_bytes = max_bytes
        self._max_peer_bytes = max_peer_bytes
        self._entries: dict[bytes, dict[str, Entry]] = {}
        self._expirations: list[tuple[float, bytes, str]] = []  # a heap; some are outdated
        self._peer_bytes: Counter[str] = Counter()
        self.num_bytes = 0  # what all entries together count for
        self.num_entries = 0

    def store(self, key: bytes, subkey: str, value: bytes, expiration_time: float) -> bool:
        """Whether the entry is there now: it is new, expires later than before, or is the same."""
        self._drop_expired()
        if not expiration_time > self._now():
            return False
        old = self._entries.get(key, {}).get(subkey)
        if old is not None and expiration_time <= old[1]:
            return old == (value, expiration_time)
        if not self._has_room(key, subkey, value, old):
            return False
        if old is not None:
            self._remove(key, subkey)
        self._entries.setdefault(key, {})[subkey] = (value, expiration_time)
        self._count(subkey, ENTRY_BYTES + len(value), 1)
        heapq.heappush(self._expirations, (expiration_time, key, subkey))
        return True

    def get(self, key: bytes) -> dict[str, Entry]:
        """The live entries under `key`."""
        self._drop_expired()
        return dict(self._entries.get(key, {}))

    def keys(self) -> Iterable[bytes]:
        """All keys with a live entry."""
        self._drop_expired()
        return list(self._entries)

    def _has_room(self, key: bytes, subkey: str, value: bytes, old: Entry | None) -> bool:
        if old is None and len(self._entries.get(key, ())) >= MAX_SUBKEYS:
            return False
        more_bytes = len(value) - len(old[0]) if old is not None else ENTRY_BYTES + len(value)
        return (
            self._peer_bytes[subkey] + more_bytes <= self._max_peer_bytes
            and self.num_bytes + more_bytes <= self._max_bytes
        )

    def _remove(self, key: bytes, subkey: str) -> None:
        value, _ = self._entries[key].pop(subkey)
        if not self._entries[key]:
            del self._entries[key]
        self._count(subkey, -ENTRY_BYTES - len(value), -1)

    def _count(self, subkey: str, num_bytes: int, num_entries: int) -> None:
        self.num_bytes += num_bytes
        self.num_entries += num_entries
        self._peer_bytes[subkey] += num_bytes
        if not self._peer_bytes[subkey]:
            del self._peer_bytes[subkey]

    def _drop_expired(self) -> None:
        now = self._now()
        while self._expirations and self._expirations[0][0] <= now:
            expiration_time, key, subkey = heapq.heappop(self._expirations)
            entry = self._entries.get(key, {}).get(subkey)
            if entry is not None and entry[1] == expiration_time:
                self._remove(key, subkey)
        self._compact()

    def _compact(self) -> None:
        """Forget outdated expirations before they outnumber the entries."""
        if len(self._expirations) > 1024 + 2 * self.num_entries:
            self._expirations = [
                (entry[1], key, subkey)
                for key, entries in self._entries.items()
                for subkey, entry in entries.items()
            ]
            heapq.heapify(self._expirations)
