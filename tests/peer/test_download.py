"""How the work of one download is shared: sources fast and slow, complete and partial."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from dht.errors import Offline, Unreachable
from dipaco.digest import CHUNK_BYTES, blob_digest, index_of
from peer.blob_server import BlobRequest, BlobServer, chunk_bits
from peer.blobs import BlobClient
from peer.download import MAX_SOURCES_KNOWN, STALL_SECONDS, Download
from peer.events import EventLog
from peer.faults import Faults
from peer.memory import Line, MemoryNetwork
from peer.sources import (
    FAULTS_TO_SKIP,
    MAX_SKIP_SECONDS,
    MIN_FRAME_TIMEOUT_SECONDS,
    SAME_FAULT_SECONDS,
    SKIP_SECONDS,
    Sources,
)
from peer.store import BlobStore
from tests.names import peer_named
from tests.virtual_clock import run_virtual

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
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
            self.network.lines[peer_named(name)] = line
        transport = self.network.transport(peer_named(name))
        store = self.stores[name] = BlobStore(self.directory / name)
        if has_it:
            store.add(BLOB)
        await BlobServer(store).serve(transport)
        self.clients[name] = BlobClient(store, transport, self.faults)

    async def fetch(self, name: str, *sources: str, seconds: float | None = None) -> float:
        """Returns how many seconds it took."""
        start = asyncio.get_running_loop().time()
        await self.clients[name].fetch(
            DIGEST, map(peer_named, sources), max_bytes=len(BLOB), timeout_seconds=seconds
        )
        assert self.stores[name].read(DIGEST) == BLOB
        return asyncio.get_running_loop().time() - start

    def sent_blobs(self, name: str) -> float:
        return self.network.transports[peer_named(name)].traffic.sent_bytes / len(BLOB)

    def received_blobs(self, name: str) -> float:
        return self.network.transports[peer_named(name)].traffic.received_bytes / len(BLOB)


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


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_what_is_here_in_no_time_is_asked_of_one_source_unless_that_is_silent(
    peers: Peers, is_cut_off: bool
) -> None:
    async def scenario() -> None:
        names = ["first", "second", "third"]
        fast = Line(bandwidth_bytes_per_second=NUM_CHUNKS * CHUNK_BYTES, latency_seconds=0.01)
        await peers.start("client", line=Line())
        for name in names:
            await peers.start(name, has_it=True, line=fast)
            peers.clients["client"].sources.brought(peer_named(name), len(BLOB), 1.0)
        if is_cut_off:
            peers.network.partition([peer_named("client")], [peer_named("first")])
        seconds = await peers.fetch("client", *names)
        sent = [peers.sent_blobs(name) > 0 for name in names]
        if is_cut_off:
            assert peers.network.faults["partition"]
            assert sent[0] is False
            assert any(sent[1:])
            assert seconds < MIN_FRAME_TIMEOUT_SECONDS
        else:
            assert sent == [True, False, False]
            assert seconds < 1.2

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
        peers.clients["client"].sources.brought(peer_named("origin"), CHUNK_BYTES, 1.0)
        await peers.fetch("client", "half", "origin")
        part.close()

    run_virtual(scenario())


def test_a_slow_line_may_take_all_the_time_it_needs(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client")
        await peers.start("source", has_it=True, line=Line(bandwidth_bytes_per_second=80_000))
        # 13 s a chunk; none for a minute would be the end.
        assert await peers.fetch("client", "source") > 8 * STALL_SECONDS
        assert not peers.faults.total

    run_virtual(scenario())


def test_a_download_that_stalls_is_given_up_however_many_sources_it_has(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client")
        await peers.start("source", has_it=True)
        others = [f"other{number}" for number in range(MAX_SOURCES_KNOWN - 1)]
        peers.network.partition([peer_named("client")], map(peer_named, others))
        fetching = asyncio.create_task(peers.fetch("client", "source", *others))
        await asyncio.sleep(NUM_CHUNKS / 2)
        peers.network.partition([peer_named("client")], [peer_named("source")])
        cut_time = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable, match="nothing of"):
            await fetching
        seconds = asyncio.get_running_loop().time() - cut_time
        assert STALL_SECONDS - 2 < seconds <= STALL_SECONDS + 1
        index = peers.stores["client"].index(DIGEST)
        assert index is not None
        part = peers.stores["client"].open_part(index)
        assert len(part.missing) < 0.7 * NUM_CHUNKS, "what came before is kept"
        part.close()

    run_virtual(scenario())


def test_a_source_whose_name_is_no_peers_does_not_stop_the_others(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client")
        await peers.start("source", has_it=True)
        client = peers.clients["client"]
        bogus = "1" * 40
        with pytest.raises(Unreachable, match="none of the peers"):
            await client.fetch(DIGEST, [bogus], max_bytes=len(BLOB))
        await client.fetch(DIGEST, [bogus, peer_named("source")], max_bytes=len(BLOB))
        assert peers.stores["client"].read(DIGEST) == BLOB
        assert peers.faults.by_peer == {bogus: {"Unreachable": 2}}

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


class OneChunk:
    """A transport to peers of whom only `source` has a blob, of one chunk."""

    peer_id = "client"
    blob = BLOB[:100]

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.num_offline = 0  # requests that fail because our own p2pd is gone

    async def stream(
        self, peer_id: str, protocol: str, payload: bytes, **limits: object
    ) -> AsyncGenerator[bytes, None]:
        await self.may_answer.wait()
        if self.num_offline:
            self.num_offline -= 1
            raise Offline("this peer's p2pd has ended")
        request = BlobRequest.from_bytes(payload, sender="client")
        if peer_id != "source":
            return
        if request.num_chunks == 0:
            yield index_of(self.blob).to_bytes()
        else:
            yield chunk_bits([0], 0)
            yield self.blob

    def download(self, peers: Peers, known: Sources) -> Download:
        return Download(
            blob_digest(self.blob),
            store=peers.stores["client"],
            transport=self,  # type: ignore[arg-type]
            faults=peers.faults,
            sources=known,
            max_bytes=len(self.blob),
        )


def test_a_request_that_is_given_up_before_it_began_leaves_nothing_behind(peers: Peers) -> None:
    """A source comes up to be asked for the index in the moment in which another one brings it."""

    async def scenario() -> None:
        await peers.start("client")
        known, transport = Sources(), OneChunk()
        now = asyncio.get_running_loop().time()
        for number in range(FAULTS_TO_SKIP + 9):  # so whoever else has something to do goes first
            known.failed("source", now=now + number * SAME_FAULT_SECONDS)
        download = transport.download(peers, known)
        download.add(["source"])
        running = asyncio.create_task(download.run())
        await asyncio.sleep(0.1)
        download.add(["other"])
        transport.may_answer.set()
        async with asyncio.timeout(10):
            await running
        assert peers.stores["client"].read(blob_digest(transport.blob)) == transport.blob

    run_virtual(scenario())


def test_nobody_is_blamed_while_we_are_cut_off_ourselves(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client")
        known, transport = Sources(), OneChunk()
        transport.may_answer.set()
        transport.num_offline = 10
        download = transport.download(peers, known)
        download.add(["source"])
        async with asyncio.timeout(15):
            await download.run()
        assert not transport.num_offline
        assert not known.num_faults("source")
        assert not peers.faults.total

    run_virtual(scenario())


def test_a_source_may_have_nothing_however_often(peers: Peers) -> None:
    async def scenario() -> None:
        await peers.start("client")
        known, transport = Sources(), OneChunk()
        transport.may_answer.set()
        download = transport.download(peers, known)
        download.add(["other", "source"])
        download._sources["other"].num_empty = 5000
        await download.run()
        assert download._sources["other"].num_empty == 5001

    run_virtual(scenario())
    sources = Sources()
    for number in range(5000):
        sources.failed("peer", now=number * SAME_FAULT_SECONDS)
    assert not sources.is_skipped("peer", now=5000 * SAME_FAULT_SECONDS + MAX_SKIP_SECONDS)


def test_the_best_sources_come_first_and_bad_ones_are_skipped_for_a_while() -> None:
    sources = Sources()
    sources.brought("slow", CHUNK_BYTES, 4.0)
    sources.brought("fast", CHUNK_BYTES, 1.0)
    assert sources.ranked(["slow", "new", "fast"], now=0.0) == ["fast", "new", "slow"]
    sources.failed("fast", now=0.0)
    assert sources.ranked(["slow", "new", "fast"], now=0.0) == ["new", "slow", "fast"]
    sources.failed("fast", now=0.5 * SAME_FAULT_SECONDS)  # another stream on the same line
    for number in range(1, FAULTS_TO_SKIP):
        now = number * SAME_FAULT_SECONDS
        assert not sources.is_skipped("fast", now)
        sources.failed("fast", now)
    assert sources.is_skipped("fast", now)
    assert not sources.is_skipped("fast", now + SKIP_SECONDS)
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
