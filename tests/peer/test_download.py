"""How the work of one download is shared: sources fast and slow, complete and partial."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from dht.errors import Unreachable
from dipaco.digest import CHUNK_BYTES, blob_digest
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.memory import Line, MemoryNetwork
from peer.sources import FAULTS_TO_SKIP, MIN_FRAME_TIMEOUT_SECONDS, SKIP_SECONDS, Sources
from peer.store import BlobStore
from tests.virtual_clock import run_virtual

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_CHUNKS = 40
BLOB = random.Random(0).randbytes(NUM_CHUNKS * CHUNK_BYTES)
DIGEST = blob_digest(BLOB)
CHUNK_A_SECOND = Line(bandwidth_bytes_per_second=CHUNK_BYTES, latency_seconds=0.02)


class Peers:
    """A network of peers that fetch from, and serve, one another."""

    def __init__(self, directory: Path) -> None:
        self.network = MemoryNetwork(line=CHUNK_A_SECOND)
        self.stores: dict[str, BlobStore] = {}
        self.clients: dict[str, BlobClient] = {}
        self.directory = directory
        self.events = EventLog(directory / "events", lambda: 0.0)
        self.faults = Faults(self.events)

    async def start(self, name: str, *, has_it: bool = False, line: Line | None = None) -> None:
        if line is not None:
            self.network.lines[name] = line
        transport = self.network.transport(name)
        store = self.stores[name] = BlobStore(self.directory / name)
        if has_it:
            store.add(BLOB)
        await BlobServer(store).serve(transport)
        self.clients[name] = BlobClient(store, transport, self.faults)

    async def fetch(self, name: str, *sources: str, seconds: float = 500.0) -> float:
        """Returns how many seconds it took."""
        start = asyncio.get_running_loop().time()
        await self.clients[name].fetch(
            DIGEST, sources, max_bytes=len(BLOB), timeout_seconds=seconds
        )
        assert self.stores[name].read(DIGEST) == BLOB
        return asyncio.get_running_loop().time() - start

    def sent_blobs(self, name: str) -> float:
        return self.network.transports[name].traffic.sent_bytes / len(BLOB)

    def received_blobs(self, name: str) -> float:
        return self.network.transports[name].traffic.received_bytes / len(BLOB)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    peers = Peers(tmp_path)
    yield peers
    peers.events.close()


@pytest.mark.parametrize("num_sources", [1, 2, 4])
def test_equal_sources_take_no_longer_than_their_lines(peers: Peers, num_sources: int) -> None:
    async def scenario() -> None:
        await peers.start("client", line=Line(latency_seconds=0.02))
        sources = [f"source{number}" for number in range(num_sources)]
        for source in sources:
            await peers.start(source, has_it=True)
        seconds = await peers.fetch("client", *sources)
        assert seconds < 1.15 * NUM_CHUNKS / num_sources
        assert peers.received_blobs("client") < 1.01, "nothing came twice"
        assert not peers.faults.total

    run_virtual(scenario())


def test_a_slow_source_does_not_hold_the_last_run(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client", line=Line())
        await peers.start("slow", has_it=True, line=Line(bandwidth_bytes_per_second=50_000))
        await peers.start("fast", has_it=True)
        seconds = await peers.fetch("client", "slow", "fast")
        assert seconds < 1.15 * NUM_CHUNKS, "a chunk takes the slow one 21 s"
        assert peers.received_blobs("client") < 1 + 2 / NUM_CHUNKS

    run_virtual(scenario())


def test_a_slow_uplink_sends_its_blob_about_once(peers: Peers) -> None:
    """The members have only parts of it while they serve each other."""

    async def scenario() -> None:
        members = ["a", "b", "c", "d"]
        await peers.start("origin", has_it=True)
        for member in members:
            await peers.start(member, line=Line(bandwidth_bytes_per_second=10 * CHUNK_BYTES))
        await asyncio.gather(*(peers.fetch(m, "origin", *members) for m in members))
        assert peers.sent_blobs("origin") < 1.25
        assert asyncio.get_running_loop().time() < 1.4 * NUM_CHUNKS
        assert not peers.faults.total, "not to have a chunk yet is no fault"

    run_virtual(scenario())


def test_what_nobody_has_all_of_is_given_up(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("origin", has_it=True)
        await peers.start("half")
        await peers.start("client")
        with pytest.raises(Unreachable):
            await peers.fetch("half", "origin", seconds=NUM_CHUNKS / 2)
        index = peers.stores["half"].index(DIGEST)
        assert index is not None
        part = peers.stores["half"].open_part(index)
        assert 0 < len(part.missing) < NUM_CHUNKS
        with pytest.raises(Unreachable, match=f"{len(part.missing)} chunks"):
            await peers.fetch("client", "half")
        assert asyncio.get_running_loop().time() < NUM_CHUNKS * 2
        peers.clients["client"].sources.brought("origin", CHUNK_BYTES, 1.0)
        await peers.fetch("client", "half", "origin")
        part.close()

    run_virtual(scenario())


def test_who_wants_the_same_blob_adds_its_sources(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client", line=Line())
        await peers.start("one", has_it=True)
        await peers.start("two", has_it=True)
        first = asyncio.create_task(peers.fetch("client", "one"))
        await asyncio.sleep(2)
        second = asyncio.create_task(peers.fetch("client", "two"))
        assert max(await asyncio.gather(first, second)) < 1.2 * NUM_CHUNKS / 2 + 2

    run_virtual(scenario())


def test_the_best_sources_come_first_and_bad_ones_are_skipped_for_a_while() -> None:
    sources = Sources()
    sources.brought("slow", CHUNK_BYTES, 4.0)
    sources.brought("fast", CHUNK_BYTES, 1.0)
    assert sources.ranked(["slow", "new", "fast"], now=0.0) == ["fast", "new", "slow"]
    sources.failed("fast", now=0.0)
    assert sources.ranked(["slow", "new", "fast"], now=0.0) == ["new", "slow", "fast"]
    for _ in range(FAULTS_TO_SKIP - 1):
        assert not sources.is_skipped("fast", now=0.0)
        sources.failed("fast", now=0.0)
    assert sources.is_skipped("fast", now=0.0)
    assert not sources.is_skipped("fast", now=SKIP_SECONDS)
    sources.brought("fast", 1, 1.0)
    assert sources.num_faults("fast") == 0


def test_a_fast_source_is_not_waited_for_as_long_as_a_slow_one() -> None:
    sources = Sources()
    unknown = sources.frame_seconds("peer")
    sources.brought("peer", CHUNK_BYTES, 0.01)
    assert sources.frame_seconds("peer") == MIN_FRAME_TIMEOUT_SECONDS < unknown
    for _ in range(50):
        sources.brought("peer", CHUNK_BYTES, 100.0)
    assert sources.frame_seconds("peer") == unknown
