"""Bytes from strangers in place of frames, slow strangers, and greedy ones."""

from __future__ import annotations

import asyncio
import resource
import struct
from contextlib import AsyncExitStack, closing, suppress
from typing import TYPE_CHECKING

import pytest
from hivemind.p2p import PeerID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dht.errors import BadMessage, PeerFault, Unreachable
from peer import rpc
from peer import transport as limits
from peer.framing import ACK, FrameKind, frame_header
from peer.transport import MAX_ERROR_BYTES, MAX_STREAMS_PER_PEER, RemoteError
from tests.peer.transport_contract import COUNT, ECHO, HANG, Handlers, ask
from tests.swarm.local import local_swarm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.swarm.local import LocalPeer

HUGE = struct.pack(">BI", 0, 2**32 - 1)


class FakeInfo:
    peer_id = "attacker"


class FakeP2P:
    peer_id = "us"


class FakeWriter:
    """Where a server writes to when its client is made of bytes."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_closed = False

    def write(self, data: bytes | memoryview) -> None:
        self.written += data

    async def drain(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


async def echo(_asker: str, payload: bytes) -> AsyncIterator[bytes]:
    yield payload


def serve_bytes(raw: bytes) -> bytes:
    """What our server answers to a stream that carries `raw` and is then closed."""

    async def main() -> bytes:
        transport = rpc.Libp2pTransport(FakeP2P())
        reader, writer = asyncio.StreamReader(), FakeWriter()
        reader.feed_data(raw)
        reader.feed_eof()
        await transport._answer(echo, 100, FakeInfo(), reader, writer)
        assert writer.is_closed
        return bytes(writer.written)

    return asyncio.run(main())


def receive_bytes(raw: bytes) -> list[bytes]:
    """What our client makes of a server that sends `raw` and closes."""

    async def main() -> list[bytes]:
        transport = rpc.Libp2pTransport(FakeP2P())
        reader, writer = asyncio.StreamReader(), FakeWriter()
        reader.feed_data(raw)
        reader.feed_eof()
        frames = []
        while (frame := await transport._next_frame("p", reader, writer, 100)) is not None:
            frames.append(frame)
        assert writer.written == ACK
        return frames

    return asyncio.run(main())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
@example(HUGE)
@example(frame_header(FrameKind.END, 0))
@example(frame_header(FrameKind.ERROR, 2) + b"no")
@example(frame_header(FrameKind.DATA, 101) + bytes(101))
def test_a_server_answers_any_bytes_with_frames_or_not_at_all(raw: bytes) -> None:
    answer = serve_bytes(raw)
    assert len(answer) <= 2 * 5 + max(100, MAX_ERROR_BYTES)
    if answer:
        assert answer[0] in (FrameKind.DATA, FrameKind.ERROR)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(HUGE)
@example(frame_header(FrameKind.ERROR, 3) + b"\xff\xfe\xfd")
def test_a_client_makes_a_named_fault_of_any_bytes(raw: bytes) -> None:
    try:
        frames = receive_bytes(raw)
    except (PeerFault, Unreachable):
        return
    assert all(len(frame) <= 100 for frame in frames)
    assert raw.startswith(b"".join(frame_header(FrameKind.DATA, len(f)) + f for f in frames))


async def open_raw(
    attacker: LocalPeer, victim: LocalPeer, protocol: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream without our framing, as an attacker would open it."""
    _, reader, writer = await attacker.swarm.p2p.call_binary_stream_handler(
        PeerID.from_base58(victim.peer_id), protocol
    )
    return reader, writer


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for what happens inside the other side's tasks."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


@pytest.mark.swarm
def test_a_length_header_of_4_gib_takes_no_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [attacker, victim]:
            await Handlers().serve(victim.transport)
            before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            reader, writer = await open_raw(attacker, victim, ECHO)
            with closing(writer):
                writer.write(HUGE)
                for _ in range(8):
                    writer.write(bytes(2**20))
                header = await reader.readexactly(5)
                assert header[0] == FrameKind.ERROR
                assert b"the limit is 1000" in await reader.readexactly(header[4])
            after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            # the 8 MiB are our own, as the attacker in the same process
            assert after_kib - before_kib < 64 * 1024
            assert await ask(attacker.transport, victim.peer_id, ECHO, b"still here")

    asyncio.run(main())


@pytest.mark.swarm
def test_a_greedy_peer_is_refused_while_others_are_served(tmp_path: Path) -> None:
    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [attacker, victim, other], AsyncExitStack() as stack:
            await Handlers().serve(victim.transport)
            for _ in range(MAX_STREAMS_PER_PEER):
                _, writer = await open_raw(attacker, victim, ECHO)
                stack.enter_context(closing(writer))
                writer.write(b"\x00\x00\x00")  # never finishes its header
            await until(lambda: len(victim.transport._answering) == MAX_STREAMS_PER_PEER)
            with pytest.raises(RemoteError, match="too many streams"):
                await ask(attacker.transport, victim.peer_id, ECHO)
            assert await ask(other.transport, victim.peer_id, ECHO, b"hi")
            await stack.aclose()
            await until(lambda: not victim.transport._answering)
            assert await ask(attacker.transport, victim.peer_id, ECHO, b"hi")

    asyncio.run(main())


@pytest.mark.swarm
def test_streams_that_say_nothing_shut_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it nothing at all, or nothing after the answer has come."""
    monkeypatch.setattr(limits, "MAX_STREAMS", 4)

    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [attacker, victim, other], AsyncExitStack() as stack:
            await Handlers().serve(victim.transport)
            readers = []
            for number in range(4):
                reader, writer = await open_raw(attacker, victim, ECHO)
                stack.enter_context(closing(writer))
                readers.append(reader)
                if number % 2:
                    writer.write(frame_header(FrameKind.DATA, 0))
                    assert await reader.readexactly(5), "and is not acknowledged"
            await until(lambda: len(victim.transport._answering) == 4)
            for _ in readers:
                frames = other.transport.stream(
                    victim.peer_id, HANG, b"", timeout_seconds=5, max_frame_bytes=10
                )
                stack.push_async_callback(frames.aclose)
                assert await anext(frames) == b"first"
            async with asyncio.timeout(10):
                for reader in readers:
                    await reader.read()  # until it is cut

    asyncio.run(main())


@pytest.mark.swarm
def test_slow_peers_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "IDLE_SECONDS", 0.3)

    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [attacker, victim], AsyncExitStack() as stack:
            await Handlers().serve(victim.transport)
            reader, writer = await open_raw(attacker, victim, ECHO)
            stack.enter_context(closing(writer))
            writer.write(b"\x00\x00\x00")  # never finishes its header
            async with asyncio.timeout(10):
                assert await reader.read() == b""
            _, writer = await open_raw(attacker, victim, COUNT)
            stack.enter_context(closing(writer))
            writer.write(frame_header(FrameKind.DATA, 3) + b"200")  # asks for 200 MiB, reads none
            await until(lambda: victim.transport.traffic.received_bytes > 0)
            await until(lambda: not victim.transport._answering)
            assert victim.transport.traffic.sent_bytes < 100 * 2**20

    asyncio.run(main())


@pytest.mark.swarm
def test_a_server_that_breaks_the_framing_is_named(tmp_path: Path) -> None:
    answers = [HUGE, b"\x07" * 10, frame_header(FrameKind.END, 0), b"\x00\x00", b""]
    errors = [BadMessage, BadMessage, BadMessage, Unreachable, Unreachable]

    async def main() -> None:
        async with local_swarm(tmp_path, 2) as [client, attacker]:

            async def answer(
                _info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                with closing(writer), suppress(OSError):
                    writer.write(answers[turn])
                    await writer.drain()
                    if len(answers[turn]) >= 5:
                        while await reader.read(100):  # until the client leaves
                            pass

            await attacker.swarm.p2p.add_binary_stream_handler("/evil", answer)
            for turn, error in enumerate(errors):  # noqa: B007 - read by `answer`
                with pytest.raises(error):
                    await ask(client.transport, attacker.peer_id, "/evil")

    asyncio.run(main())
