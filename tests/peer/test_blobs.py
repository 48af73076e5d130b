"""Blobs from several peers: shared work, bad sources named, nothing wrong accepted."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dht.errors import Unreachable
from dht.memory import MemoryDHT, MemorySwarm
from dht.records import Provider
from dipaco.digest import CHUNK_BYTES, blob_digest
from peer.blob_server import BLOB_PROTOCOL, BlobRequest, BlobServer, chunk_bits
from peer.blobs import BlobClient
from peer.download import MAX_SOURCES_KNOWN
from peer.events import EventLog
from peer.faults import Faults
from peer.manifest import BlobRef
from peer.memory import Line, MemoryNetwork
from peer.providers import Providers
from peer.store import BlobStore
from tests.little_run import identity
from tests.names import peer_named
from tests.virtual_clock import run_virtual

BLOB = random.Random(0).randbytes(20 * CHUNK_BYTES + 7)
DIGEST = blob_digest(BLOB)
SMALL = BLOB[: 2 * CHUNK_BYTES]


class Place:
    """A network with one client and as many sources as are asked for."""

    def __init__(self, directory: Path) -> None:
        self.network = MemoryNetwork()
        self.directory = directory
        self.store = BlobStore(directory / "client")
        self.events = EventLog(directory / "events", lambda: 0.0)
        self.faults = Faults(self.events)
        self.client = BlobClient(
            self.store, self.network.transport(peer_named("client")), self.faults
        )

    async def source(self, name: str, blob: bytes = BLOB) -> BlobStore:
        store = BlobStore(self.directory / name)
        store.add(blob)
        await BlobServer(store).serve(self.network.transport(peer_named(name)))
        return store

    async def liar(self, name: str, blob: bytes = BLOB) -> None:
        """Has the right index and wrong bytes."""
        honest = BlobStore(self.directory / name)
        honest.add(blob)

        async def answer(peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
            request = BlobRequest.from_bytes(payload, sender=peer_id)
            index = honest.index(request.digest)
            assert index is not None
            if request.num_chunks == 0:
                yield index.to_bytes()
                return
            chunks = request.chunks[: request.num_chunks]
            yield chunk_bits(chunks, request.first_chunk)
            for _ in chunks:
                yield b"\0" * CHUNK_BYTES

        transport = self.network.transport(peer_named(name))
        await transport.serve(BLOB_PROTOCOL, answer, max_request_bytes=512)

    async def fetch(self, *sources: str, seconds: float = 100.0) -> None:
        peers = [peer_named(name) for name in sources]
        await self.client.fetch(DIGEST, peers, max_bytes=len(BLOB), timeout_seconds=seconds)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def run(place: Place, coroutine: object) -> None:
    try:
        run_virtual(coroutine)  # type: ignore[arg-type]
    finally:
        place.events.close()


def test_sources_share_the_work(place: Place) -> None:
    async def scenario() -> None:
        place.network.default_line = Line(bandwidth_bytes_per_second=CHUNK_BYTES)
        place.network.lines[peer_named("client")] = Line()
        for name in ("one", "two"):
            await place.source(name)
        start = asyncio.get_running_loop().time()
        await place.fetch("one", "two")
        assert place.store.read(DIGEST) == BLOB
        # One source at a chunk a second would need 21 s.
        assert asyncio.get_running_loop().time() - start < 16
        assert not place.faults.total

    run(place, scenario())


def test_a_liar_is_found_out_counted_and_replaced(place: Place) -> None:
    async def scenario() -> None:
        await place.liar("liar")
        await place.source("honest")
        await place.fetch("liar", "honest")
        assert place.store.read(DIGEST) == BLOB
        assert place.faults.by_peer[peer_named("liar")]["BadBlob"] == 1

    run(place, scenario())


def test_a_small_blob_survives_a_liar_asked_first(tmp_path: Path) -> None:
    """With one run of chunks there is nothing to do for the second source, until there is."""
    place = Place(tmp_path)

    async def scenario() -> None:
        await place.liar("liar", SMALL)
        await place.source("honest", SMALL)
        sources = [peer_named("liar"), peer_named("honest")]
        digest = blob_digest(SMALL)
        await place.client.fetch(digest, sources, max_bytes=len(SMALL), timeout_seconds=100)
        assert place.store.read(digest) == SMALL

    run(place, scenario())


def test_one_impatient_caller_does_not_take_the_blob_from_another(place: Place) -> None:
    async def scenario() -> None:
        place.network.default_line = Line(bandwidth_bytes_per_second=CHUNK_BYTES)
        await place.source("source")
        patient = asyncio.create_task(place.fetch("source"))
        await asyncio.sleep(0)
        with pytest.raises(Unreachable):
            await place.fetch("source", seconds=2)
        await patient
        assert place.store.read(DIGEST) == BLOB

    run(place, scenario())


def test_what_arrived_before_a_crash_is_not_fetched_again(place: Place) -> None:
    async def scenario() -> None:
        place.network.default_line = Line(bandwidth_bytes_per_second=CHUNK_BYTES)
        await place.source("first")
        with pytest.raises(Unreachable):
            await place.fetch("first", seconds=10)
        before = place.network.transports[peer_named("client")].traffic.received_bytes
        await asyncio.sleep(1)
        place.network.crash(peer_named("first"))
        await place.source("second")
        await place.fetch("second")
        assert place.store.read(DIGEST) == BLOB
        second = place.network.transports[peer_named("client")].traffic.received_bytes - before
        # At most the run of chunks that the crash cut is asked for again.
        assert second < len(BLOB) - 2 * CHUNK_BYTES

    run(place, scenario())


def test_who_allows_less_does_not_keep_the_blob_from_who_allows_more(place: Place) -> None:
    async def scenario() -> None:
        await place.source("source")
        small = place.client.fetch(
            DIGEST, [peer_named("source")], max_bytes=1000, timeout_seconds=10
        )
        both = [asyncio.create_task(small), asyncio.create_task(place.fetch("source"))]
        await asyncio.gather(*both)
        assert place.store.read(DIGEST) == BLOB
        assert peer_named("source") not in place.faults.by_peer

    run(place, scenario())


def test_a_blob_larger_than_allowed_is_refused_before_it_is_read(place: Place) -> None:
    async def scenario() -> None:
        await place.source("source")
        with pytest.raises(Unreachable):
            await place.client.fetch(
                DIGEST, [peer_named("source")], max_bytes=1000, timeout_seconds=10
            )
        assert place.faults.by_peer[peer_named("source")]["BadBlob"] == 1
        assert place.network.transports[peer_named("client")].traffic.received_bytes < 4096

    run(place, scenario())


def test_made_up_providers_do_not_keep_everyone_from_those_there_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a download asks, and first in the order of peer IDs."""
    ref = BlobRef(digest=DIGEST, num_bytes=len(BLOB))
    dht = MemoryDHT(latency_seconds=0.0)
    *others, honest = sorted((identity(n) for n in range(100)), key=lambda key: key.peer_id)
    asked: list[set[str]] = []

    async def fetch(digest: str, sources: list[str], *, max_bytes: int) -> None:
        asked.append(set(sources[:MAX_SOURCES_KNOWN]))
        raise Unreachable("nobody")

    async def scenario() -> None:
        for key in (*others, honest):
            swarm = MemorySwarm(dht, key)
            assert await swarm.store(Provider(peer=key.peer_id, digest=DIGEST), 300.0)
        monkeypatch.setattr(place.client, "fetch", fetch)
        providers = Providers(MemorySwarm(dht, identity(200)), place.store, place.client)
        providers.hints = [peer_named("who we joined through")]
        for _ in range(10):
            with pytest.raises(Unreachable):
                await providers.obtain(ref)
        assert all(providers.hints[0] in sources for sources in asked)
        assert any(honest.peer_id in sources for sources in asked)

    run(place, scenario())
