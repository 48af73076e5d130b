"""`peer.transport.Transport` over libp2p: raw streams of p2pd, with the frames of `peer.framing`.

The other door to libp2p (`dht/kademlia.py` is the first). hivemind's own handlers are not used:
they read an 8-byte length and buffer up to it, have no deadlines, and take the end of a stream for
the end of a message.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING

from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.proto import p2pd_pb2

from dht.control import CONTROL_BUFFER_BYTES, ask_daemon, dial
from dht.errors import BadMessage, Offline, Unreachable
from dht.identity import peer_id_bytes
from peer.framing import ACK, HEADER, FrameKind, FramingError, frame_header, read_frame, write_frame
from peer.throttle import Meter
from peer.transport import (
    IDLE_SECONDS,
    MAX_REFUSALS,
    REFUSAL,
    REFUSAL_SECONDS,
    IncomingLimit,
    IncomingStream,
    OutgoingLimit,
    RemoteError,
    answers,
    deadline,
    error_text,
    only_frame,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from hivemind.p2p import P2P
    from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

    from peer.transport import Handler

REGISTER_SECONDS = 5.0  # to tell p2pd that we serve a protocol
CLOSE_SECONDS = 3.0  # to tell it that we no longer serve any
MAX_DISCARDED_BYTES = 16 * 2**20  # of a refused request, so that its sender gets to read why
_CUT = (OSError, EOFError)  # what a broken stream raises


class _GoneError(Exception):
    """Whoever asked us is gone, or too slow."""


class Libp2pTransport:
    """The streams of one p2pd. `p2p` is `KademliaSwarm.p2p`, and stays the swarm's to close."""

    def __init__(self, p2p: P2P, *, meter: Meter | None = None) -> None:
        self.peer_id = str(p2p.peer_id)
        self._meter = meter or Meter()
        self.traffic = self._meter.traffic
        self._p2p = p2p
        self._handlers: dict[str, Callable[..., Coroutine[object, object, None]]] = {}
        self._incoming = IncomingLimit()
        self._outgoing = OutgoingLimit()
        self._refusals = asyncio.Semaphore(MAX_REFUSALS)
        self._answering: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.StreamWriter] = set()
        self._is_closed = False

    async def stream(
        self,
        peer_id: str,
        protocol: str,
        payload: bytes,
        *,
        timeout_seconds: float,
        max_frame_bytes: int,
    ) -> AsyncGenerator[bytes, None]:
        """See `Transport`."""
        async with AsyncExitStack() as stack:
            async with deadline(peer_id, timeout_seconds) as timeout:
                await stack.enter_async_context(self._outgoing.slot(peer_id))
                reader, writer = await self._open(peer_id, protocol)
                stack.callback(self._leave, writer)
                await self._meter.send(HEADER.size + len(payload), urgent=True)
                # not drained: a peer that refuses a large request answers before it has read it
                writer.write(frame_header(FrameKind.DATA, len(payload)))
                writer.write(payload)
                next_frame = partial(self._next_frame, peer_id, reader, writer, max_frame_bytes)
                frame = await next_frame(timeout)
            while frame is not None:
                yield frame
                async with deadline(peer_id, timeout_seconds) as timeout:
                    frame = await next_frame(timeout)

    async def request(
        self,
        peer_id: str,
        protocol: str,
        payload: bytes,
        *,
        timeout_seconds: float,
        max_response_bytes: int,
    ) -> bytes:
        """See `Transport`."""
        frames = self.stream(
            peer_id,
            protocol,
            payload,
            timeout_seconds=timeout_seconds,
            max_frame_bytes=max_response_bytes,
        )
        return await only_frame(peer_id, frames, timeout_seconds)

    async def serve(self, protocol: str, handler: Handler, *, max_request_bytes: int) -> None:
        """See `Transport`."""
        self._handlers[protocol] = partial(self._answer, handler, max_request_bytes)
        await self._register(protocol)

    async def connect(self, maddr: str, *, timeout_seconds: float = 10.0) -> str:
        """See `Transport`."""
        return await dial(self._p2p, maddr, timeout_seconds=timeout_seconds)

    async def rebind(self, p2p: P2P) -> None:
        """Serve and ask through another p2pd from now on, since the former one is gone.

        Streams of that one are cut. Raises `Unreachable` if the new one is gone, too.
        """
        self._p2p = p2p
        await self._cut_streams()
        await asyncio.gather(*(self._register(protocol) for protocol in self._handlers))

    async def close(self) -> None:
        """See `Transport`."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(TimeoutError, P2PDaemonError, *_CUT):
            async with asyncio.timeout(CLOSE_SECONDS):
                for protocol in self._handlers:
                    await self._p2p.remove_binary_stream_handler(protocol)
        await self._cut_streams()

    async def _register(self, protocol: str) -> None:
        try:
            async with asyncio.timeout(REGISTER_SECONDS):
                await self._p2p.add_binary_stream_handler(protocol, self._handlers[protocol])
        except (TimeoutError, P2PDaemonError, *_CUT) as e:
            raise Offline("this peer's p2pd has ended") from e

    async def _cut_streams(self) -> None:
        for writer in self._asking:
            writer.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _open(
        self, peer_id: str, protocol: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._is_closed:
            raise Offline("this peer has left")
        if peer_id == self.peer_id:
            raise ValueError("a peer does not ask itself")
        stream = p2pd_pb2.StreamOpenRequest(peer=peer_id_bytes(peer_id), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream)
        try:
            _, reader, writer = await ask_daemon(
                self._p2p, request, buffer_bytes=self._meter.buffer_bytes
            )
        except Offline:
            raise
        except Unreachable as e:
            raise Unreachable(f"peer {peer_id}: {e}") from e
        self._meter.opened()
        self._asking.add(writer)
        return reader, writer

    def _leave(self, writer: asyncio.StreamWriter) -> None:
        self._asking.discard(writer)
        writer.close()

    async def _next_frame(
        self,
        peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_frame_bytes: int,
        timeout: asyncio.Timeout | None = None,
    ) -> bytes | None:
        """The next data frame, or None after the last one, which is then acknowledged."""
        try:
            kind, frame = await read_frame(
                reader, max_frame_bytes=max_frame_bytes, meter=self._meter, timeout=timeout
            )
        except FramingError as e:
            raise BadMessage(peer_id, str(e)) from e
        except _CUT as e:
            raise Unreachable(f"peer {peer_id}: the stream was cut") from e
        if kind is FrameKind.DATA:
            return frame
        writer.write(ACK)
        if kind is FrameKind.ERROR:
            raise RemoteError(peer_id, frame.decode(errors="replace"))
        return None

    async def _answer(
        self,
        handler: Handler,
        max_request_bytes: int,
        info: StreamInfo,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Serve one stream that another peer has opened. Nothing that it does raises here."""
        peer_id = str(info.peer_id)
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        self._meter.opened()
        stream = None if self._is_closed else self._incoming.enter(peer_id, task.cancel)
        try:
            if stream is not None:
                await self._converse(stream, handler, max_request_bytes, reader, writer)
            elif not (self._is_closed or self._refusals.locked()):
                async with self._refusals:
                    await self._send(writer, FrameKind.ERROR, REFUSAL)
                    await self._wait_for_ack(reader, REFUSAL_SECONDS)
        except _GoneError:
            pass  # its own deadline tells it
        except asyncio.CancelledError:
            pass  # it was cut; asyncio takes a cancelled server task for an error, and logs
        finally:
            if stream is not None:
                self._incoming.leave(stream)
            self._answering.discard(task)
            writer.close()

    async def _converse(
        self,
        stream: IncomingStream,
        handler: Handler,
        max_request_bytes: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            payload = await self._read_request(reader, max_request_bytes)
            stream.is_busy = True
            async with aclosing(answers(handler, stream.peer_id, payload)) as frames:
                async for frame in frames:
                    await self._send(writer, FrameKind.DATA, frame)
            await self._send(writer, FrameKind.END)
        except _GoneError:
            raise
        except Exception as e:  # the task boundary: a handler's error is an answer
            await self._send(writer, FrameKind.ERROR, error_text(e))
        stream.is_busy = False
        await self._wait_for_ack(reader, IDLE_SECONDS)

    async def _wait_for_ack(self, reader: asyncio.StreamReader, timeout_seconds: float) -> None:
        """See `peer.framing`: to close earlier loses frames, even while a refused request comes."""
        num_bytes = 0
        with suppress(TimeoutError, *_CUT):
            async with asyncio.timeout(timeout_seconds):
                while num_bytes <= MAX_DISCARDED_BYTES:
                    part = await reader.read(CONTROL_BUFFER_BYTES)
                    if not part or part.endswith(ACK):
                        return
                    num_bytes += len(part)

    async def _read_request(self, reader: asyncio.StreamReader, max_request_bytes: int) -> bytes:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                kind, payload = await read_frame(
                    reader, max_frame_bytes=max_request_bytes, meter=self._meter
                )
        except (TimeoutError, *_CUT) as e:
            raise _GoneError from e
        if kind is not FrameKind.DATA:
            raise FramingError("a request is a data frame")
        return payload

    async def _send(
        self, writer: asyncio.StreamWriter, kind: FrameKind, payload: bytes | memoryview = b""
    ) -> None:
        try:
            await write_frame(writer, kind, payload, meter=self._meter, idle_seconds=IDLE_SECONDS)
        except (TimeoutError, *_CUT) as e:
            raise _GoneError from e
