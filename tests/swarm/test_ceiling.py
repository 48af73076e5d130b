"""`--max-mbps` against what a network interface counts, on a real p2pd in a network namespace."""

from __future__ import annotations

import asyncio
import math
import os
import time
from typing import TYPE_CHECKING

import pytest

from dht.daemon import DaemonConfig
from dht.records import Provider
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.store import BlobStore
from peer.throttle import Meter
from tests.peer.transport_contract import ECHO, Handlers, ask
from tests.swarm.local import start_peer
from tests.swarm.namespaces import Internet, require_namespaces

if TYPE_CHECKING:
    from pathlib import Path

    from tests.swarm.local import LocalPeer
    from tests.swarm.namespaces import Host

pytestmark = pytest.mark.swarm

MBPS = 16.0
BLOB_BYTES = 8 * 2**20  # 4.2 s at that rate
READ_AHEAD_BYTES = 2**20  # of each stream, that buffers take in before they are full
MARGIN = 0.1  # between what is shown and what was counted


class Machine:
    """A peer on a host of its own."""

    def __init__(self, directory: Path, name: str, host: Host) -> None:
        self.host = host
        self.store = BlobStore(directory / name / "blobs")
        self._directory = directory
        self._name = name
        self._events = EventLog(directory / name / "events", time.time)

    async def start(self, mbps: float, initial_peers: tuple[str, ...] = ()) -> LocalPeer:
        config = DaemonConfig(
            host_maddrs=(f"/ip4/{self.host.address}/tcp/0",), launcher=self.host.launcher
        )
        self.peer = await start_peer(
            self._directory,
            self._name,
            initial_peers=initial_peers,
            config=config,
            meter=Meter(mbps * 1e6 / 8),
        )
        await BlobServer(self.store).serve(self.peer.transport)
        self.client = BlobClient(self.store, self.peer.transport, Faults(self._events))
        return self.peer

    async def close(self) -> None:
        await self.client.close()
        await self.peer.close()
        self._events.close()


async def watch(host: Host, sent: list[tuple[float, int]]) -> None:
    while True:
        sent.append((time.monotonic(), host.traffic_bytes[1]))
        await asyncio.sleep(0.1)


def busiest_second(sent: list[tuple[float, int]]) -> float:
    """The most bytes per second over any second or more between two looks."""
    return max(
        (end_bytes - begin_bytes) / (end - begin)
        for i, (begin, begin_bytes) in enumerate(sent)
        for end, end_bytes in sent[i + 1 :]
        if end - begin >= 1
    )


def test_the_ceiling_holds_and_the_traffic_shown_is_the_traffic_sent(tmp_path: Path) -> None:
    require_namespaces()

    async def main() -> None:
        with Internet() as internet:
            machines = [Machine(tmp_path, name, internet.host()) for name in ("free", "limited")]
            free, limited = machines
            first = await free.start(math.inf)
            try:
                await limited.start(MBPS, (first.maddr,))
                await check(free, limited)
            finally:
                for machine in machines:
                    await machine.close()

    asyncio.run(main())


async def check(free: Machine, limited: Machine) -> None:
    await Handlers().serve(limited.peer.transport)
    uploaded, downloaded = (
        machine.store.add(os.urandom(BLOB_BYTES)) for machine in (limited, free)
    )
    sent: list[tuple[float, int]] = []
    before_received, _ = limited.host.traffic_bytes
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(limited.host, sent))
        fetches = [
            group.create_task(
                machine.client.fetch(
                    digest, [source.peer.peer_id], max_bytes=BLOB_BYTES, timeout_seconds=60
                )
            )
            for machine, digest, source in ((free, uploaded, limited), (limited, downloaded, free))
        ]
        await asyncio.sleep(1)
        provider = Provider(peer=limited.peer.peer_id, digest=uploaded)
        await limited.peer.swarm.store(provider, 60.0)
        asked = time.monotonic()
        await ask(free.peer.transport, limited.peer.peer_id, ECHO, b"hi")
        answer_seconds = time.monotonic() - asked
        await asyncio.gather(*fetches)
        watching.cancel()
    seconds = time.monotonic() - begin
    limit = MBPS * 1e6 / 8

    assert busiest_second(sent) <= limit
    assert seconds < 1.25 * BLOB_BYTES / limit, "the ceiling is there to be used"
    received = limited.host.traffic_bytes[0] - before_received
    assert received <= limit * seconds + READ_AHEAD_BYTES
    assert answer_seconds < 0.5, "a small message waited for a chunk"
    traffic = limited.peer.transport.traffic
    assert traffic.dht_sent_bytes > 0
    for shown, counted in zip(
        (traffic.wire_received_bytes, traffic.wire_sent_bytes),
        limited.host.traffic_bytes,
        strict=True,
    ):
        assert shown == pytest.approx(counted, rel=MARGIN)
