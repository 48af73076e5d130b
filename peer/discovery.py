"""Finding later versions of the manifest: who points to one, and whether it is one.

A pointer is a rumour and names only a digest. What it leads to counts if the operator signed it and
each version continues the one before, back to one that is known here.
"""

import asyncio
import shutil
from collections.abc import Sequence
from weakref import WeakValueDictionary

from dht.errors import BadMessage, PeerFault, RunMismatch, Unreachable
from dht.keys import manifest_key
from dht.records import ManifestPointer
from peer.blobs import BlobClient
from peer.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from peer.node import Node
from peer.store import BlobStore

MANIFEST_TIMEOUT_SECONDS = 60.0
MAX_CLAIMS = 4  # followed in one look; those that were refuted make room for others in the next
MAX_SEARCHES = 8  # at once, for what messages name
MAX_REFUTED = 1024  # digests, and peers; the oldest is forgotten first


class Discovery:
    """Brings a peer's history up to the newest manifest."""

    def __init__(self, node: Node) -> None:
        self._node = node
        # Apart from what was found good: a stranger names the digest, and bad bytes are deleted.
        directory = node.state_dir / "unchecked"
        shutil.rmtree(directory, ignore_errors=True)
        self._store = BlobStore(directory)
        self._blobs = BlobClient(
            self._store, node.transport, node.faults, sources=node.blobs.sources
        )
        self._refuted: dict[str, None] = {}  # digests that led to no manifest of this run
        self._liars: dict[str, None] = {}  # peers that named them
        self._searching: set[str] = set()  # peers whose messages name an unknown manifest
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by digest

    async def close(self) -> None:
        """Give up whatever is being fetched."""
        await self._blobs.close()

    async def look(self) -> bool:
        """Read who points to a manifest that is not known here; True if there is a later one."""
        node = self._node
        records = [
            record
            for record in await node.swarm.read(manifest_key(node.run))
            if isinstance(record, ManifestPointer)
            and node.history.get(record.manifest) is None
            and record.manifest not in self._refuted
            and record.peer not in self._liars
        ]
        operator = node.history.first.peer
        records.sort(key=lambda record: (record.peer != operator, -record.version))
        sources: dict[str, list[str]] = {}
        for record in records:
            sources.setdefault(record.manifest, []).append(record.peer)
        found = [await self.follow(d, peers) for d, peers in list(sources.items())[:MAX_CLAIMS]]
        return any(found)

    async def ask(self, digest: str, peer: str) -> bool:
        """Follow what a message of `peer` named; True if it led to a later manifest."""
        if digest in self._refuted or peer in self._liars or peer in self._searching:
            return False
        if len(self._searching) >= MAX_SEARCHES:
            return False
        self._searching.add(peer)
        try:
            return await self.follow(digest, [peer])
        finally:
            self._searching.discard(peer)

    async def follow(self, digest: str, sources: Sequence[str]) -> bool:
        """Take up the manifest of that digest, and those that come before it.

        False if it cannot be had, or is none; `sources` claim that it is one.
        """
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with lock:
            return await self._follow(digest, sources)

    async def _follow(self, digest: str, sources: Sequence[str]) -> bool:
        node = self._node
        try:
            chain = await self._fetch_chain(digest, sources)
            added = [node.history.add(manifest, sender=sources[0]) for manifest in chain]
        except Unreachable as error:
            node.faults.count(error, sources[0])
            return False
        except (PeerFault, RunMismatch) as error:
            culprit = error.peer_id if isinstance(error, PeerFault) else sources[0]
            node.faults.count(error, culprit)
            _remember(self._refuted, digest)
            if culprit == sources[0]:
                _remember(self._liars, culprit)
            return False
        for manifest in chain:
            node.events.write(
                "manifest",
                version=manifest.version,
                digest=manifest.digest,
                first_slot=manifest.first_slot,
                levels=list(manifest.topology.shape),
                num_phases=manifest.num_phases,
            )
        return any(added)

    async def _fetch_chain(self, digest: str, sources: Sequence[str]) -> list[Manifest]:
        """The manifest of that digest and those before it that are unknown here, oldest first."""
        history = self._node.history
        chain: list[Manifest] = []
        while history.get(digest) is None:
            manifest = await self._fetch(digest, sources)
            if manifest.peer != history.first.peer:
                raise BadMessage(sources[0], "names a manifest of another operator")
            if manifest.predecessor is None:
                raise BadMessage(sources[0], "names a manifest of another run")
            if chain and manifest.version != chain[0].version - 1:
                raise BadMessage(sources[0], "names a manifest whose versions have a gap")
            chain.insert(0, manifest)
            digest = manifest.predecessor
        return chain

    async def _fetch(self, digest: str, sources: Sequence[str]) -> Manifest:
        try:
            await self._blobs.fetch(
                digest,
                sources,
                max_bytes=MAX_MANIFEST_BYTES,
                timeout_seconds=MANIFEST_TIMEOUT_SECONDS,
            )
            raw = self._store.read(digest)
        finally:
            self._store.remove(digest)  # also what came of one that never got here
        if raw is None:
            raise Unreachable(f"manifest {digest[:12]} was damaged on disk")
        return await self._node.offload(
            lambda: parse_manifest(raw, digest=digest, sender=sources[0])
        )


def _remember(names: dict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > MAX_REFUTED:
        names.pop(next(iter(names)))
