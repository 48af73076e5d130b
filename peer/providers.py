"""Who has which blob: provider records for what the manifest names.

Contributions and module states need none of this: their holders are known from the round's roster
and from the head records.
"""

import random
from collections.abc import Iterable

from dht.errors import Rejected, Unreachable
from dht.keys import provider_key
from dht.records import Provider
from dht.swarm import Swarm
from peer.blobs import BlobClient
from peer.manifest import BlobRef
from peer.store import BlobStore

PROVIDER_LIFETIME_SECONDS = 300.0
PROVIDER_RENEW_SECONDS = 120.0


class Providers:
    """Finds sources for blobs, and announces this peer as one."""

    def __init__(self, swarm: Swarm, store: BlobStore, blobs: BlobClient) -> None:
        self._swarm = swarm
        self._store = store
        self._blobs = blobs
        self._announced: dict[str, float] = {}
        self._random = random.Random(swarm.peer_id)
        self.hints: list[str] = []  # peers that probably have everything: who we joined through

    async def obtain(self, ref: BlobRef) -> None:
        """Have the blob in the store, and announce it; `Unreachable` if nobody has it."""
        if ref.digest not in self._store:
            records = await self._swarm.read(provider_key(ref.digest))
            providers = [record.peer for record in records if isinstance(record, Provider)]
            self._random.shuffle(providers)  # so that made-up ones do not always come first
            sources = [*self.hints, *providers]
            await self._blobs.fetch(ref.digest, sources, max_bytes=ref.num_bytes)
        await self.announce([ref.digest])

    async def announce(self, digests: Iterable[str]) -> None:
        """Say that we have these blobs, unless that was said lately."""
        now = self._swarm.now()
        for digest in digests:
            age = now - self._announced.get(digest, 0.0)  # negative after a clock was set back
            if 0 <= age < PROVIDER_RENEW_SECONDS:
                continue
            record = Provider(peer=self._swarm.peer_id, digest=digest)
            try:
                if await self._swarm.store(record, PROVIDER_LIFETIME_SECONDS):
                    self._announced[digest] = now
            except (Unreachable, Rejected):
                continue  # said again at the next renewal

    async def withdraw(self) -> None:
        """Take back every announcement, on leaving."""
        for digest in list(self._announced):
            await self._swarm.withdraw(Provider(peer=self._swarm.peer_id, digest=digest))
        self._announced.clear()
