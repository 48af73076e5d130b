"""p2pd dies or hangs under a peer, and the peer goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from dht.daemon import with_ports
from dht.errors import Unreachable
from dht.records import Provider
from peer.watchdog import Watchdog
from tests.dht.swarm_contract import announcement
from tests.peer.transport_contract import ECHO, HANG, Handlers, ask
from tests.swarm.local import local_swarm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.swarm.local import LocalPeer

pytestmark = pytest.mark.swarm

T = TypeVar("T")

RECOVERY_SECONDS = 10.0  # what is promised
PROBE_SECONDS = 0.2  # between two calls while p2pd is away


@asynccontextmanager
async def probing(*calls: Callable[[], Awaitable[object]]) -> AsyncIterator[list[Exception]]:
    """Make each of these calls again and again; yields what they raise."""
    errors: list[Exception] = []

    async def probe(call: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await call()
            except Exception as error:
                errors.append(error)
            await asyncio.sleep(PROBE_SECONDS)

    tasks = [asyncio.create_task(probe(call)) for call in calls]
    try:
        yield errors
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_it_works(call: Callable[[], Awaitable[T]]) -> T:
    """The result of `call`, once it does not fail as `Unreachable`."""
    while True:
        try:
            return await call()
        except Unreachable:
            await asyncio.sleep(PROBE_SECONDS)


async def check_both_directions(peer: LocalPeer, others: list[LocalPeer], *, mark: int) -> None:
    """Requests and records pass from `peer` to all others, and back."""
    for other in others:
        await until_it_works(lambda other=other: ask(peer.transport, other.peer_id, ECHO))  # type: ignore[misc]
        await until_it_works(lambda other=other: ask(other.transport, peer.peer_id, ECHO))  # type: ignore[misc]
    ours, theirs = announcement(peer.peer_id, mark), announcement(others[0].peer_id, mark)
    assert await until_it_works(lambda: peer.swarm.store(ours, 60))
    assert await until_it_works(lambda: others[0].swarm.store(theirs, 60))
    for reader in (peer, *others):
        assert {ours, theirs} <= set(await until_it_works(lambda r=reader: r.swarm.read(ours.key)))  # type: ignore[misc]


async def break_and_recover(
    peer: LocalPeer,
    others: list[LocalPeer],
    fault: Callable[[], object],
    events: list[dict[str, Any]],
    *,
    mark: int,
) -> list[Exception]:
    """Do `fault` to the peer's p2pd; returns what calls raised until it was there again."""
    pid = peer.daemon.pid
    record = Provider(peer=peer.peer_id, digest="d" * 64)
    await peer.swarm.store(record, 300)
    expires = (await others[0].swarm._entries(record.key))[peer.peer_id][1]
    frames = peer.transport.stream(
        others[0].peer_id, HANG, b"", timeout_seconds=60, max_frame_bytes=100
    )
    assert await anext(frames) == b"first"
    calls = (
        lambda: ask(peer.transport, others[0].peer_id, ECHO),
        lambda: peer.swarm.read(record.key),
        lambda: peer.swarm.store(Provider(peer=peer.peer_id, digest="e" * 64), 60),
        peer.swarm.maddrs,
    )
    async with probing(*calls) as errors:
        events.clear()
        fault()
        fault_time = time.monotonic()
        with pytest.raises(Unreachable, match="cut"):
            await anext(frames)
        await peer.swarm.withdraw(Provider(peer=peer.peer_id, digest="f" * 64))  # as far as it goes
        async with asyncio.timeout(RECOVERY_SECONDS):
            await check_both_directions(peer, others, mark=mark)
        seconds = time.monotonic() - fault_time
    assert peer.daemon.pid != pid, "the fault happened"
    assert seconds < RECOVERY_SECONDS
    assert [event["event"] for event in events] == ["p2pd restarted"]
    published = (await others[0].swarm._entries(record.key))[peer.peer_id][1]
    assert published > expires, "records are published again"
    return errors


def test_a_dead_a_hanging_and_an_unheard_p2pd_are_replaced_within_ten_seconds(
    tmp_path: Path,
) -> None:
    events: list[dict[str, Any]] = []

    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [a, peer, b]:
            for each in (a, peer, b):
                await Handlers().serve(each.transport)
            await ask(peer.transport, b.peer_id, ECHO)
            watchdog = Watchdog(peer.daemon, peer.swarm, peer.transport)
            watchdog.report = lambda event, **fields: events.append({"event": event, **fields})
            async with watchdog.running():
                assert await watchdog._answers(), "it knows now who is connected"
                faults = (
                    lambda: os.kill(peer.daemon.pid, signal.SIGKILL),
                    lambda: os.kill(peer.daemon.pid, signal.SIGSTOP),
                    lambda: peer.swarm.p2p._client.control._read_task.cancel(),
                )
                for mark, fault in enumerate(faults):
                    errors = await break_and_recover(peer, [a, b], fault, events, mark=mark)
                    assert errors, "calls fail meanwhile"
                    assert all(isinstance(error, Unreachable) for error in errors)
                assert await peer.swarm.maddrs() == [peer.maddr]

    asyncio.run(main())


def test_restarts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    async def main() -> None:
        async with local_swarm(tmp_path, 1) as [peer]:
            monkeypatch.setattr("peer.watchdog.CHECK_SECONDS", 0.01)
            monkeypatch.setattr("dht.daemon._p2pd_file", lambda: "/bin/false")
            watchdog = Watchdog(peer.daemon, peer.swarm, peer.transport)
            limited = asyncio.Event()

            def report(event: str, **_: object) -> None:
                events.append(event)
                if event == "p2pd keeps failing":
                    limited.set()

            watchdog.report = report
            os.kill(peer.daemon.pid, signal.SIGKILL)
            async with watchdog.running(), asyncio.timeout(20):
                await limited.wait()

    asyncio.run(main())
    assert events == ["p2pd not restarted"] * 5 + ["p2pd keeps failing"]


@pytest.mark.parametrize(
    ("host_maddr", "expected"),
    [
        ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/tcp/81"),
        ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/82"),
        ("/ip6/::/tcp/0", "/ip6/::/tcp/83"),
        ("/ip4/10.0.0.9/tcp/0", "/ip4/10.0.0.9/tcp/0"),
        ("/ip4/0.0.0.0/tcp/7", "/ip4/0.0.0.0/tcp/7"),
        ("/ip4/0.0.0.0/tcp/70", "/ip4/0.0.0.0/tcp/70"),
    ],
)
def test_a_restarted_p2pd_listens_where_it_did(host_maddr: str, expected: str) -> None:
    listening = ["/ip4/10.0.0.1/tcp/81", "/ip4/127.0.0.1/tcp/82", "/ip6/::1/tcp/83"]
    assert with_ports([host_maddr], listening) == (expected,)
