"""What every `peer.transport.Transport` promises, checked on whichever implementation is given."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from dht.errors import BadMessage, PeerFault, Unreachable
from peer import transport as limits
from peer.transport import (
    MAX_ERROR_BYTES,
    MAX_OUTGOING_STREAMS_PER_PEER,
    MAX_STREAMS_PER_PEER,
    RemoteError,
    Transport,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ECHO, COUNT, FAIL, HANG, NOTHING = (
    f"/test/{name}/1" for name in ("echo", "count", "fail", "hang", "nothing")
)
CHUNK = bytes(range(256)) * 4096  # 1 MiB


class Handlers:
    """The other side, and what it has noticed."""

    def __init__(self) -> None:
        self.num_open = 0
        self.max_open = 0
        self.is_left = asyncio.Event()
        self.is_full = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def serve(self, transport: Transport) -> None:
        for protocol, handler in {
            ECHO: self.echo,
            COUNT: self.count,
            FAIL: self.fail,
            HANG: self.hang,
            NOTHING: self.nothing,
        }.items():
            await transport.serve(protocol, handler, max_request_bytes=1000)

    async def echo(self, asker: str, payload: bytes) -> AsyncIterator[bytes]:
        yield asker.encode() + b" " + payload

    async def count(self, _asker: str, payload: bytes) -> AsyncIterator[bytes | memoryview]:
        for i in range(int(payload)):
            yield memoryview(CHUNK)[i:]

    async def fail(self, _asker: str, payload: bytes) -> AsyncIterator[bytes]:
        yield b"first"
        if payload == b"bug":
            raise KeyError("a secret of ours")
        raise ValueError("no such thing" + "!" * MAX_ERROR_BYTES)

    async def hang(self, _asker: str, _payload: bytes) -> AsyncIterator[bytes]:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        if self.num_open == MAX_OUTGOING_STREAMS_PER_PEER:
            self.is_full.set()
        try:
            yield b"first"
            await self.may_go_on.wait()
            yield b"second"
        finally:
            self.num_open -= 1
            self.is_left.set()

    async def nothing(self, _asker: str, _payload: bytes) -> AsyncIterator[bytes]:
        for frame in ():
            yield frame


async def ask(client: Transport, peer_id: str, protocol: str, payload: bytes = b"") -> bytes:
    return await client.request(
        peer_id, protocol, payload, timeout_seconds=5, max_response_bytes=2**20
    )


async def collect(client: Transport, peer_id: str, protocol: str, payload: bytes) -> list[bytes]:
    frames = client.stream(peer_id, protocol, payload, timeout_seconds=5, max_frame_bytes=2**20)
    return [frame async for frame in frames]


async def check_transport(client: Transport, server: Transport) -> None:
    """`client` already knows how to reach `server`."""
    handlers = Handlers()
    await handlers.serve(server)
    peer_id = server.peer_id

    assert await ask(client, peer_id, ECHO, b"hi") == client.peer_id.encode() + b" hi"
    assert await collect(client, peer_id, COUNT, b"5") == [CHUNK[i:] for i in range(5)]
    assert await collect(client, peer_id, COUNT, b"0") == []
    assert client.traffic.received_bytes >= 5 * len(CHUNK) - 10
    assert server.traffic.sent_bytes == client.traffic.received_bytes
    assert server.traffic.received_bytes == client.traffic.sent_bytes > 0

    await check_errors(client, peer_id)
    await check_limits(client, peer_id, handlers)


async def check_errors(client: Transport, peer_id: str) -> None:
    with pytest.raises(RemoteError, match="no such thing") as caught:
        await collect(client, peer_id, FAIL, b"")
    assert len(caught.value.why) == MAX_ERROR_BYTES
    assert caught.value.peer_id == peer_id
    with pytest.raises(RemoteError) as caught:
        await collect(client, peer_id, FAIL, b"bug")
    assert caught.value.why == "internal error"
    with pytest.raises(RemoteError, match="1001"):
        await ask(client, peer_id, ECHO, bytes(1001))
    with pytest.raises(BadMessage, match="several"):
        await ask(client, peer_id, COUNT, b"2")
    with pytest.raises(BadMessage, match="no frame"):
        await ask(client, peer_id, NOTHING)
    with pytest.raises(BadMessage, match=str(len(CHUNK))):
        await client.request(
            peer_id, COUNT, b"1", timeout_seconds=5, max_response_bytes=len(CHUNK) - 1
        )
    with pytest.raises(Unreachable):
        await ask(client, peer_id, "/test/unknown/1")
    with pytest.raises(ValueError, match="itself"):
        await ask(client, client.peer_id, ECHO)
    for name in ("1" * 40, client.peer_id[:-1], "12D3KooW" + "z" * 44):
        with pytest.raises(ValueError, match="not the peer ID"):
            await ask(client, name, ECHO)
    assert issubclass(RemoteError, PeerFault)


async def check_limits(client: Transport, peer_id: str, handlers: Handlers) -> None:
    frames = client.stream(peer_id, HANG, b"", timeout_seconds=0.2, max_frame_bytes=10)
    async with aclosing(frames):
        assert await anext(frames) == b"first"
        with pytest.raises(Unreachable, match=r"0\.2 s"):
            await anext(frames)

    # leaving early tells the server at its next frame, at the latest
    handlers.is_left.clear()
    frames = client.stream(peer_id, HANG, b"", timeout_seconds=5, max_frame_bytes=10)
    async with aclosing(frames):
        assert await anext(frames) == b"first"
    handlers.may_go_on.set()
    async with asyncio.timeout(5):
        await handlers.is_left.wait()

    # many streams wait for one another instead of being refused
    handlers.may_go_on.clear()
    handlers.max_open = 0
    num_streams = MAX_STREAMS_PER_PEER + 4
    tasks = [asyncio.create_task(collect(client, peer_id, HANG, b"")) for _ in range(num_streams)]
    async with asyncio.timeout(5):
        await handlers.is_full.wait()
    handlers.may_go_on.set()
    assert await asyncio.gather(*tasks) == [[b"first", b"second"]] * num_streams
    assert handlers.max_open <= MAX_STREAMS_PER_PEER


async def check_crowd(
    greedy: Transport, modest: Transport, server: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for 4 streams, `greedy` takes all of it, and `modest` comes along."""
    monkeypatch.setattr(limits, "MAX_STREAMS", 4)
    handlers = Handlers()
    await handlers.serve(server)
    streams = [
        greedy.stream(server.peer_id, HANG, b"", timeout_seconds=5, max_frame_bytes=10)
        for _ in range(4)
    ]
    for frames in streams:
        assert await anext(frames) == b"first"
    with pytest.raises(RemoteError, match="too many streams"):
        await ask(greedy, server.peer_id, ECHO)
    assert await ask(modest, server.peer_id, ECHO, b"hi") == modest.peer_id.encode() + b" hi"
    with pytest.raises(Unreachable, match="cut"):
        await anext(streams[0])
    handlers.may_go_on.set()
    assert [await anext(frames) for frames in streams[1:]] == [b"second"] * 3
    for frames in streams:
        await frames.aclose()
