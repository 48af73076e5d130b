from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import hivemind.dht.protocol
import pytest
from hivemind.proto import dht_pb2

from dht.errors import RunMismatch, Unreachable
from tests.dht.swarm_contract import announcement, check_closed_swarm, check_swarm
from tests.swarm.local import local_swarm, start_peer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.swarm


def test_keeps_the_promises_of_a_swarm(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 4) as peers:
            await check_swarm([peer.swarm for peer in peers])
            await check_closed_swarm(peers[-1].swarm)

    asyncio.run(main())


def test_records_outlive_the_first_peer_and_a_newcomer_finds_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 4) as peers:
            key = announcement(peers[0].peer_id, 1).key
            for peer in peers:
                assert await peer.swarm.store(announcement(peer.peer_id, 1), 60)
            await peers[0].close()
            newcomer = await start_peer(tmp_path, "late", initial_peers=[peers[2].maddr])
            try:
                assert len(await newcomer.swarm.read(key)) == 4, "until they expire"
                assert await newcomer.swarm.store(announcement(newcomer.peer_id, 1), 60)
                for peer in peers[1:]:
                    assert len(await peer.swarm.read(key)) == 5
            finally:
                await newcomer.close()

    asyncio.run(main())


def test_one_dead_address_among_several_does_no_harm(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 1) as [first]:
            dead = f"/ip4/127.0.0.1/tcp/9/p2p/{first.peer_id[:-4]}aaaa"
            peer = await start_peer(tmp_path, "a", initial_peers=[dead, first.maddr])
            assert peer.swarm.neighbors == {first.peer_id}
            await peer.close()
            with pytest.raises(Unreachable, match="cannot reach"):
                await start_peer(tmp_path, "b", initial_peers=[dead])

    asyncio.run(main())


GARBAGE = b"\xff"
FALSE_TIME = dht_pb2.PingResponse(dht_time=1.0).SerializeToString()


def false_node_id() -> bytes:
    node = dht_pb2.NodeInfo(node_id=b"\xff" * 21)
    answer: bytes = dht_pb2.PingResponse(peer=node, dht_time=time.time()).SerializeToString()
    return answer


def test_one_who_greets_wrongly_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [first, liar]:
            handlers = liar.swarm.p2p._client.control.unary_handlers
            [ping] = [name for name in handlers if name.endswith("rpc_ping")]
            lie = GARBAGE

            async def answer(_data: bytes, _peer_id: object) -> bytes:
                return lie

            handlers[ping] = answer
            of_another_kind = f"{first.maddr.rpartition('/')[0]}/Qm{'a' * 44}"
            peer = await start_peer(tmp_path, "a")
            try:
                for told in (false_node_id(), FALSE_TIME, GARBAGE):
                    lie = told
                    await peer.swarm.join([of_another_kind, liar.maddr, first.maddr])
                    assert first.peer_id in peer.swarm.neighbors, "the honest one is known"
                with pytest.raises(Unreachable, match="does not answer as a peer"):
                    await peer.swarm.join([liar.maddr])
                with pytest.raises(Unreachable, match="not the address of a peer"):
                    await peer.swarm.join([of_another_kind])
            finally:
                await peer.close()

    asyncio.run(main())


def test_a_clock_that_is_off_is_told_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # only what nodes tell about their own clock is shifted
    monkeypatch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() + 41)

    async def main() -> None:
        async with local_swarm(tmp_path, 1) as [first]:
            with pytest.raises(RunMismatch, match="your clock is 41 s behind") as caught:
                await start_peer(tmp_path, "a", initial_peers=[first.maddr])
            assert "clock" in caught.value.hint

    asyncio.run(main())


def test_a_restarted_peer_replaces_its_longer_lived_record(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [first, second]:
            assert await second.swarm.store(announcement(second.peer_id, 1), 600)
            await second.close()
            again = await start_peer(tmp_path, "1", initial_peers=[first.maddr])
            assert again.peer_id == second.peer_id
            renewed = announcement(again.peer_id, 2)
            assert await again.swarm.store(renewed, 30)
            assert await first.swarm.read(renewed.key) == [renewed]
            await again.close()

    asyncio.run(main())


def test_a_peer_whose_p2pd_died_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 1) as [peer]:
            peer.daemon._process.kill()
            await peer.daemon._process.wait()
            with pytest.raises(Unreachable, match="p2pd has ended"):
                await peer.swarm.read(announcement(peer.peer_id, 1).key)

    asyncio.run(main())
