from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from dht.errors import Unreachable
from tests.peer.transport_contract import (
    ECHO,
    HANG,
    Handlers,
    ask,
    check_crowd,
    check_transport,
    collect,
)
from tests.swarm.local import local_swarm, start_peer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.swarm.local import LocalPeer

pytestmark = pytest.mark.swarm

REACH_SECONDS = 15.0


def test_keeps_the_promises_of_a_transport(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [_, a, b]:
            # these two have never been told of each other
            await check_transport(a.transport, b.transport)

    asyncio.run(main())


def test_makes_room_for_who_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [greedy, modest, server]:
            transports = greedy.transport, modest.transport, server.transport
            await check_crowd(*transports, monkeypatch)

    asyncio.run(main())


async def ask_until_reached(asker: LocalPeer, peer: LocalPeer) -> bytes:
    """Addresses spread in their own time, and some that p2pd tries first lead by who has left."""
    async with asyncio.timeout(REACH_SECONDS):
        while True:
            try:
                return await ask(asker.transport, peer.peer_id, ECHO, b"hi")
            except Unreachable:
                await asyncio.sleep(0.2)


def test_four_peers_who_know_only_the_first_go_on_without_it(tmp_path: Path) -> None:
    async def call_each_other(peers: list[LocalPeer]) -> None:
        for asker in peers:
            for peer in peers:
                if peer is not asker:
                    answer = await ask_until_reached(asker, peer)
                    assert answer == asker.peer_id.encode() + b" hi"

    async def main() -> None:
        async with local_swarm(tmp_path, 4) as peers:
            for peer in peers:
                await Handlers().serve(peer.transport)
            await peers[0].close()
            await call_each_other(peers[1:])
            newcomer = await start_peer(tmp_path, "late", initial_peers=[peers[3].maddr])
            try:
                await Handlers().serve(newcomer.transport)
                await call_each_other([*peers[1:], newcomer])
            finally:
                await newcomer.close()

    asyncio.run(main())


def test_a_peer_that_dies_cuts_its_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [a, b]:
            handlers = Handlers()
            await handlers.serve(b.transport)
            frames = a.transport.stream(
                b.peer_id, HANG, b"", timeout_seconds=10, max_frame_bytes=100
            )
            assert await anext(frames) == b"first"
            b.daemon._process.kill()
            with pytest.raises(Unreachable, match="cut"):
                await anext(frames)
            with pytest.raises(Unreachable):
                await collect(a.transport, b.peer_id, HANG, b"")
            with pytest.raises(Unreachable, match="p2pd has ended"):
                await ask(b.transport, a.peer_id, ECHO)

    asyncio.run(main())


def test_closing_cuts_streams_and_leaves_no_socket(tmp_path: Path) -> None:
    async def main() -> list[str]:
        async with local_swarm(tmp_path, 2) as [a, b]:
            handlers = Handlers()
            await handlers.serve(b.transport)
            frames = a.transport.stream(
                b.peer_id, HANG, b"", timeout_seconds=10, max_frame_bytes=100
            )
            assert await anext(frames) == b"first"
            await b.transport.close()
            await b.transport.close()
            with pytest.raises(Unreachable, match="cut"):
                await anext(frames)
            assert handlers.num_open == 0
            with pytest.raises(Unreachable, match="left"):
                await ask(b.transport, a.peer_id, ECHO)
            files = [
                b.swarm.p2p._client_listen_maddr["unix"],
                *b.daemon.control_maddr.split("/unix"),
            ]
            assert all(map(os.path.exists, filter(None, files)))
            return files

    assert not any(map(os.path.exists, asyncio.run(main())))


def test_an_unreachable_address_gives_one_line_and_a_hint(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [a, b]:
            nobody = a.peer_id[:-4] + "aaaa"
            with pytest.raises(Unreachable, match="connection refused") as caught:
                await a.transport.connect(f"/ip4/127.0.0.1/tcp/9/p2p/{nobody}")
            assert caught.value.hint
            assert "\n" not in str(caught.value)
            with pytest.raises(Unreachable, match="peer id mismatch"):
                await a.transport.connect(b.maddr.replace(b.peer_id, nobody))
            assert await a.transport.connect(b.maddr) == b.peer_id

    asyncio.run(main())
