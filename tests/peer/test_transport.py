from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from dht.errors import Unreachable
from peer.memory import Line, MemoryNetwork
from peer.transport import (
    MAX_STREAMS,
    MAX_STREAMS_PER_PEER,
    IncomingLimit,
    IncomingStream,
    RemoteError,
)
from tests.names import peer_named
from tests.peer.transport_contract import (
    CHUNK,
    ECHO,
    Handlers,
    ask,
    check_crowd,
    check_transport,
    collect,
)
from tests.virtual_clock import DeadlockError, run_virtual

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

COUNT, HANG = "/test/count/1", "/test/hang/1"
A, B, C = (peer_named(name) for name in "abc")


def now() -> float:
    return asyncio.get_running_loop().time()


def test_keeps_the_promises_of_a_transport() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        await check_transport(network.transport(A), network.transport(B))

    run_virtual(main())


def test_makes_room_for_who_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        network = MemoryNetwork()
        await check_crowd(*(network.transport(peer) for peer in (A, B, C)), monkeypatch)

    run_virtual(main())


def test_time_passes_as_latency_and_bandwidth_say() -> None:
    async def main() -> None:
        line = Line(latency_seconds=0.05, bandwidth_bytes_per_second=2**20)
        network = MemoryNetwork(line=line)
        a, b = network.transport(A), network.transport(B)
        await Handlers().serve(b)
        await ask(a, B, ECHO)
        assert now() == pytest.approx(0.2, abs=1e-3), "two ways, each through two lines"
        started = now()
        await collect(a, B, COUNT, b"1")
        assert now() - started == pytest.approx(0.2 + 1.0, abs=1e-3), "one frame in one second"

    run_virtual(main())


def test_transfers_share_a_line() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        server = peer_named("server")
        network.lines[server] = Line(bandwidth_bytes_per_second=len(CHUNK))
        await Handlers().serve(network.transport(server))
        clients = [network.transport(peer) for peer in (A, B, C)]
        await asyncio.gather(*(collect(client, server, COUNT, b"1") for client in clients))
        assert now() == pytest.approx(3.0, abs=1e-3)

    run_virtual(main())


def test_a_partition_swallows_until_it_heals() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        a, b = network.transport(A), network.transport(B)
        await Handlers().serve(b)
        network.partition([A], [B, C])
        with pytest.raises(Unreachable, match="within 5 s"):
            await ask(a, B, ECHO)
        assert now() == 5.0
        with pytest.raises(Unreachable):
            await a.connect(f"/memory/p2p/{B}")
        assert network.faults["partition"] == 2
        asyncio.get_running_loop().call_later(2, network.heal)
        assert await ask(a, B, ECHO, b"late") == f"{A} late".encode()
        assert await a.connect(f"/memory/p2p/{B}") == B

    run_virtual(main())


def test_a_crash_cuts_streams_at_once_and_refuses_new_ones() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        a, b, c = (network.transport(peer) for peer in (A, B, C))
        handlers = Handlers()
        await handlers.serve(b)
        asyncio.get_running_loop().call_later(1, network.crash, B)
        with pytest.raises(Unreachable, match="cut"):
            await collect(a, B, HANG, b"")
        assert now() == 1.0
        assert handlers.is_left.is_set()
        with pytest.raises(Unreachable, match="not running"):
            await ask(c, B, ECHO)
        with pytest.raises(Unreachable, match="not running"):
            await ask(b, A, ECHO)
        assert network.faults["crash"] == 1
        restarted = network.transport(B)
        await handlers.serve(restarted)
        assert await ask(c, B, ECHO, b"again") == f"{C} again".encode()

    run_virtual(main())


def test_a_crashed_client_is_noticed_by_its_server() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        a, b = network.transport(A), network.transport(B)
        handlers = Handlers()
        await handlers.serve(b)
        asyncio.get_running_loop().call_later(1, network.crash, A)
        with pytest.raises(Unreachable):
            await collect(a, B, HANG, b"")
        await handlers.is_left.wait()
        assert handlers.num_open == 0

    run_virtual(main())


def test_loss_cuts_streams_the_same_way_for_one_seed() -> None:
    async def main(seed: int) -> list[bool]:
        network = MemoryNetwork(seed=seed, line=Line(loss=0.2))
        a, b = network.transport(A), network.transport(B)
        await Handlers().serve(b)
        results = []
        for _ in range(30):
            try:
                await ask(a, B, ECHO)
                results.append(True)
            except Unreachable:
                results.append(False)
        assert network.faults["loss"] == results.count(False) > 0
        return results

    assert run_virtual(main(1)) == run_virtual(main(1)) != run_virtual(main(2))


class Crowd:
    """An `IncomingLimit`, and whom it has cut."""

    def __init__(self) -> None:
        self.limit = IncomingLimit()
        self.cut: list[str] = []

    def enter(self, peer: str, *, is_busy: bool = False) -> IncomingStream | None:
        stream = self.limit.enter(peer, lambda: self.cut.append(peer))
        if stream is not None:
            stream.is_busy = is_busy
        return stream

    def fill(self, num_peers: int, *, is_busy: bool) -> None:
        for number in range(MAX_STREAMS):
            assert self.enter(f"stranger{number % num_peers}", is_busy=is_busy)
        assert not self.cut


def test_a_greedy_peer_is_refused_and_others_are_not() -> None:
    crowd = Crowd()
    streams = [crowd.enter("greedy") for _ in range(MAX_STREAMS_PER_PEER + 1)]
    assert streams.count(None) == 1
    assert crowd.enter("modest")
    assert streams[0] is not None
    crowd.limit.leave(streams[0])
    assert crowd.enter("greedy")
    assert not crowd.cut


@pytest.mark.parametrize("num_peers", [MAX_STREAMS // MAX_STREAMS_PER_PEER, MAX_STREAMS])
def test_who_says_nothing_makes_room_however_many_they_are(num_peers: int) -> None:
    crowd = Crowd()
    crowd.fill(num_peers, is_busy=False)
    assert crowd.enter("modest", is_busy=True)
    assert crowd.cut == ["stranger0"], "the oldest"
    for number in range(2 * MAX_STREAMS):
        assert crowd.enter(f"other{number}")
    assert "modest" not in crowd.cut


def test_the_busiest_peers_make_room_until_the_shares_are_equal() -> None:
    crowd = Crowd()
    crowd.fill(MAX_STREAMS // MAX_STREAMS_PER_PEER, is_busy=True)
    while crowd.enter("modest", is_busy=True):
        pass
    num_modest = len(crowd.cut)
    assert num_modest == MAX_STREAMS_PER_PEER - 1
    assert len(set(crowd.cut)) == num_modest, "each of a peer that has the most"
    assert crowd.enter("another")
    crowd = Crowd()
    crowd.fill(MAX_STREAMS, is_busy=True)
    assert crowd.enter("modest") is None


def test_what_is_on_its_way_is_not_cut_for_who_has_far_more() -> None:
    crowd = Crowd()
    crowd.fill(MAX_STREAMS // MAX_STREAMS_PER_PEER, is_busy=True)
    assert crowd.enter("modest")
    crowd.cut.clear()
    assert crowd.enter("stranger0") is None
    assert not crowd.cut


def test_a_closed_transport_answers_nobody() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        a, b = network.transport(A), network.transport(B)
        await Handlers().serve(b)
        await b.close()
        await b.close()
        with pytest.raises(Unreachable):
            await ask(a, B, ECHO)

    run_virtual(main())


def test_hundreds_of_peers_share_one_process() -> None:
    async def main() -> float:
        line = Line(latency_seconds=0.05, bandwidth_bytes_per_second=1e6)
        network = MemoryNetwork(line=line)
        transports = [network.transport(peer_named(f"{i}")) for i in range(200)]
        for transport in transports:
            await Handlers().serve(transport)

        async def chatter(i: int) -> None:
            for k in range(1, 6):
                await ask(transports[i], transports[(i + k) % 200].peer_id, ECHO, bytes(500))
                await asyncio.sleep(10)

        await asyncio.gather(*map(chatter, range(200)))
        return now()

    assert run_virtual(main()) == run_virtual(main()) > 50


def test_an_endless_answer_is_cut_where_one_frame_was_due() -> None:
    async def endless(_asker: str, _payload: bytes) -> AsyncIterator[bytes]:
        while True:
            yield b"more"

    async def main() -> None:
        network = MemoryNetwork()
        a, b = network.transport(A), network.transport(B)
        await b.serve("/endless", endless, max_request_bytes=10)
        with pytest.raises(Exception, match="several"):
            await ask(a, B, "/endless")
        assert b.traffic.sent_bytes < 100
        with pytest.raises(RemoteError, match="11 bytes"):
            await ask(a, B, "/endless", bytes(11))

    run_virtual(main())


def test_the_virtual_clock_names_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.sleep(3600)
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match=r"3600\.000 s"):
        run_virtual(main())
