"""Downloads over real p2pds and bad lines: cuts, slow readers, black holes, partitions."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from dht.errors import SwarmError, Unreachable
from dipaco.digest import CHUNK_BYTES
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.store import BlobStore
from tests.fault_proxy import FaultProxy, Line
from tests.swarm.local import start_peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.swarm.local import LocalPeer

pytestmark = pytest.mark.swarm

BLOB = random.Random(0).randbytes(3 * CHUNK_BYTES + 1000)
NUM_CUT_FETCHES = 8
CONNECTION_BYTES = 24 * 1024  # of handshake and libp2p's own messages, each way
OVERHEAD = 1.01  # of encryption and framing


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A client, and two sources behind a proxy each."""

    client: BlobClient
    store: BlobStore
    faults: Faults
    peers: list[LocalPeer]
    proxies: list[FaultProxy]
    digest: str

    async def fetch(self, *sources: int, seconds: float = 30.0) -> float:
        """Returns how many seconds it took."""
        begin = time.monotonic()
        names = [self.peers[source].peer_id for source in sources]
        await self.client.fetch(self.digest, names, max_bytes=len(BLOB), timeout_seconds=seconds)
        assert self.store.file(self.digest).read_bytes() == BLOB
        self.store.remove(self.digest)
        return time.monotonic() - begin


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        peers: list[LocalPeer] = []
        proxies: list[FaultProxy] = []
        for name in ("one", "two", "client"):
            proxy = await stack.enter_async_context(FaultProxy(seed=len(proxies)))
            known = [peers[0].maddr] if peers else []
            peer = await start_peer(directory, name, initial_peers=known, config=proxy.behind)
            stack.push_async_callback(peer.close)
            peers.append(peer)
            proxies.append(proxy)
        for source in peers[:2]:
            store = BlobStore(directory / source.peer_id)
            digest = store.add(BLOB)
            await BlobServer(store).serve(source.transport)
            await peers[2].transport.connect(source.maddr)
        events = EventLog(directory / "events", time.time)
        stack.callback(events.close)
        faults = Faults(events)
        store = BlobStore(directory / "client")
        client = BlobClient(store, peers[2].transport, faults)
        stack.push_async_callback(client.close)
        yield Scene(
            client=client, store=store, faults=faults, peers=peers, proxies=proxies, digest=digest
        )


def test_a_cut_costs_at_most_the_chunk_that_was_under_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as place:
            proxy = place.proxies[0]
            proxy.line = Line(cut_after_bytes=(2**14, 4 * CHUNK_BYTES), jitter_seconds=0.002)
            await proxy.cut()
            proxy.faults.clear()
            carried, connections = proxy.forwarded_bytes["down"], proxy.num_connections
            num_done = 0
            while num_done < NUM_CUT_FETCHES:
                try:
                    await place.fetch(0)
                    num_done += 1
                except SwarmError:
                    await asyncio.sleep(0.1)  # cut three times before a chunk: what came is kept
            carried = proxy.forwarded_bytes["down"] - carried
            connections = proxy.num_connections - connections
            num_cuts = proxy.faults["cut"]
            assert num_cuts >= NUM_CUT_FETCHES / 2, "the fault happened"
            needed = NUM_CUT_FETCHES * len(BLOB) * OVERHEAD + connections * CONNECTION_BYTES
            assert carried - needed <= num_cuts * CHUNK_BYTES
            [kinds] = place.faults.by_peer.values()
            assert set(kinds) == {"Unreachable"}, "never a wrong byte"

    asyncio.run(main())


def test_bad_sources_hold_nothing_up_where_there_is_a_good_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as place:
            bad = place.proxies[0]
            bad.line = Line(bytes_per_second=20_000, latency_seconds=0.1)
            assert await place.fetch(0, 1) < 25, "a chunk takes the slow one 52 s"
            bad.line = Line()
            await bad.cut()  # with what it still holds of the slow answers
            bad.faults.clear()
            bad.partition()
            assert await place.fetch(0, 1) < 25, "the black hole is waited for by nobody"
            with pytest.raises(Unreachable):
                await place.fetch(0, seconds=1)
            waiting = asyncio.create_task(place.fetch(0))
            bad.heal()
            await waiting
            assert bad.faults["partition"] == 1

    asyncio.run(main())
