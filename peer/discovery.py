"""Finding later versions of the manifest: who points to one, and whether it is one.

A pointer is a rumour and names only a digest. What it leads to counts if the operator signed it and
each version continues the one before, back to one that is known here.
"""

import asyncio
import random
import shutil
from collections.abc import Coroutine, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dht.errors import BadMessage, PeerFault, RunMismatch, Unreachable
from dht.keys import manifest_key
from dht.records import ManifestPointer
from peer.blobs import BlobClient
from peer.chunk_plan import MAX_SOURCES
from peer.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from peer.node import Node
from peer.store import BlobStore

MANIFEST_TIMEOUT_SECONDS = 60.0  # for one version
RUMOUR_TIMEOUT_SECONDS = 10.0  # for one version to which only others than the operator point
MAX_CLAIMS = 4  # followed in one look; those that led nowhere make room for others in the next
MAX_SEARCHES = 8  # at once, for what messages name
MAX_REFUTED = 1024  # digests, and peers; the oldest is forgotten first


class Discovery:
    """Brings a peer's history up to the newest manifest."""

    def __init__(self, node: Node) -> None:
        self._node = node
        # Apart from what was found good: a stranger names the digest, and bad bytes are deleted.
        self._directory = node.state_dir / "unchecked"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._refuted: dict[str, None] = {}  # digests that led to no manifest of this run
        self._liars: dict[str, None] = {}  # peers that named them
        self._searching: set[str] = set()  # peers whose messages name an unknown manifest
        self._random = random.Random(node.peer_id)  # others hear other peers first

    async def look(self) -> bool:
        """Read who points to a manifest that is not known here; True if there is a later one.

        All that is followed is followed at once: who has nothing to give delays nobody else.
        """
        node = self._node
        operator, now = node.history.first.peer, asyncio.get_running_loop().time()
        records = [
            record
            for record in await node.swarm.read(manifest_key(node.run))
            if isinstance(record, ManifestPointer)
            and node.history.get(record.manifest) is None
            and record.manifest not in self._refuted
            and record.peer not in self._liars
            and (record.peer == operator or not node.blobs.sources.is_doubtful(record.peer, now))
        ]
        self._random.shuffle(records)

        def follow(digest: str, peers: list[str]) -> Coroutine[None, None, bool]:
            is_rumour = operator not in peers
            seconds = RUMOUR_TIMEOUT_SECONDS if is_rumour else MANIFEST_TIMEOUT_SECONDS
            return self.follow(digest, peers, timeout_seconds=seconds)

        claims = choose_claims(records, operator)
        found = await asyncio.gather(*(follow(*claim) for claim in claims), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
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

    async def follow(
        self,
        digest: str,
        sources: Sequence[str],
        *,
        timeout_seconds: float = MANIFEST_TIMEOUT_SECONDS,
    ) -> bool:
        """Take up the manifest of that digest, and those that come before it.

        False if it cannot be had within `timeout_seconds` for each, is none, or is known by now;
        `sources` claim that it is one.
        """
        node = self._node
        try:
            chain = await self._fetch_chain(digest, sources, timeout_seconds)
            added = [m for m in chain if node.history.add(m, sender=sources[0])]
        except Unreachable as error:
            node.faults.count(error, sources[0])
            for peer in sources:
                node.blobs.sources.failed(peer, asyncio.get_running_loop().time())
            return False
        except (PeerFault, RunMismatch) as error:
            culprit = error.peer_id if isinstance(error, PeerFault) else sources[0]
            node.faults.count(error, culprit)
            _remember(self._refuted, digest)
            if culprit == sources[0]:
                _remember(self._liars, culprit)
            return False
        for manifest in added:
            node.events.write(
                "manifest",
                version=manifest.version,
                digest=manifest.digest,
                first_slot=manifest.first_slot,
                levels=list(manifest.topology.shape),
                num_phases=manifest.num_phases,
            )
        return bool(added)

    async def _fetch_chain(
        self, digest: str, sources: Sequence[str], timeout_seconds: float
    ) -> list[Manifest]:
        """The manifest of that digest and those before it that are unknown here, oldest first."""
        history = self._node.history
        chain: list[Manifest] = []
        while history.get(digest) is None:
            manifest = await self._fetch(digest, sources, timeout_seconds)
            if manifest.peer != history.first.peer:
                raise BadMessage(sources[0], "names a manifest of another operator")
            if manifest.predecessor is None:
                raise BadMessage(sources[0], "names a manifest of another run")
            if chain and manifest.version != chain[0].version - 1:
                raise BadMessage(sources[0], "names a manifest whose versions have a gap")
            chain.insert(0, manifest)
            digest = manifest.predecessor
        return chain

    async def _fetch(self, digest: str, sources: Sequence[str], timeout_seconds: float) -> Manifest:
        node = self._node
        # Nothing is shared with who else wants the digest, whose sources may all keep silent.
        with TemporaryDirectory(dir=self._directory, ignore_cleanup_errors=True) as directory:
            store = BlobStore(Path(directory))
            blobs = BlobClient(store, node.transport, node.faults, sources=node.blobs.sources)
            await blobs.fetch(
                digest, sources, max_bytes=MAX_MANIFEST_BYTES, timeout_seconds=timeout_seconds
            )
            raw = store.read(digest)
        if raw is None:
            raise Unreachable(f"manifest {digest[:12]} was damaged on disk")
        return await node.offload(lambda: parse_manifest(raw, digest=digest, sender=sources[0]))


def choose_claims(
    pointers: Sequence[ManifestPointer], operator: str
) -> list[tuple[str, list[str]]]:
    """What to follow in one look: digests, each with those who are asked for it.

    The operator's first, then what most point to, then the highest version claimed.
    """
    claims: dict[str, list[ManifestPointer]] = {}
    for pointer in sorted(pointers, key=lambda pointer: pointer.peer != operator):
        claims.setdefault(pointer.manifest, []).append(pointer)

    def rank(digest: str) -> tuple[bool, int, int]:
        claim = claims[digest]
        return claim[0].peer != operator, -len(claim), -max(pointer.version for pointer in claim)

    return [
        (digest, [pointer.peer for pointer in claims[digest][:MAX_SOURCES]])
        for digest in sorted(claims, key=rank)[:MAX_CLAIMS]
    ]


def _remember(names: dict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > MAX_REFUTED:
        names.pop(next(iter(names)))
