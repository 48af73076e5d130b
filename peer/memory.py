"""The in-memory twin of `peer.rpc`: a network in one process, on the running loop's clock.

Latency, bandwidth, loss, partition and crash are scripted, and deterministic from a seed. Each
peer has one line up and one line down, which its transfers share one after another. A partition is
a black hole: what was sent waits for `heal`, and the sender for its deadline. A crashed or absent
peer refuses at once, and its open streams are cut. `faults` counts what fired, so that a test can
assert that its fault happened.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dht.errors import BadMessage, Unreachable
from dht.identity import peer_id_bytes
from peer.framing import HEADER, FrameKind
from peer.transport import (
    REFUSAL,
    IncomingLimit,
    OutgoingLimit,
    RemoteError,
    Traffic,
    answers,
    deadline,
    error_text,
    only_frame,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection

    from peer.transport import Handler

FRAMES_IN_FLIGHT = 4  # of one stream, sent and not yet taken: as TCP and its buffers would hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What connects one peer to the network."""

    latency_seconds: float = 0.0  # one way; a transfer pays that of both ends
    bandwidth_bytes_per_second: float = math.inf  # in each direction
    loss: float = 0.0  # probability that a frame's stream is cut


class StreamLostError(Exception):
    """A stream was cut by the loss of a line."""


class MemoryNetwork:
    """All peers of a simulation. `lines` overrides the default line for a peer, at any time."""

    def __init__(self, *, seed: int = 0, line: Line = Line()) -> None:
        self.default_line = line
        self.lines: dict[str, Line] = {}
        self.faults: Counter[str] = Counter()
        self.transports: dict[str, MemoryTransport] = {}
        self._random = random.Random(seed)
        self._cut: set[frozenset[str]] = set()
        self._healed = asyncio.Event()
        self._line_free_times: dict[tuple[str, str], float] = {}

    def transport(self, peer_id: str) -> MemoryTransport:
        """The transport of a peer that starts, or starts again after a crash."""
        if peer_id in self.transports:
            raise ValueError(f"{peer_id} is running")
        self.transports[peer_id] = MemoryTransport(self, peer_id)
        return self.transports[peer_id]

    def partition(self, left: Collection[str], right: Collection[str]) -> None:
        """Swallow everything between a peer of one side and a peer of the other."""
        self._cut |= {frozenset((a, b)) for a in left for b in right if a != b}

    def heal(self) -> None:
        """End every partition; what still waits arrives."""
        self._cut.clear()
        self._healed.set()
        self._healed = asyncio.Event()

    def crash(self, peer_id: str) -> None:
        """Kill a peer: its streams are cut, in both directions, and nobody reaches it."""
        self.faults["crash"] += 1
        self.transports[peer_id].abort()

    def line(self, peer_id: str) -> Line:
        """What connects `peer_id` now."""
        return self.lines.get(peer_id, self.default_line)

    async def carry(self, sender: str, receiver: str, num_bytes: int) -> float:
        """Wait until the bytes are on their way; returns the seconds until they arrive.

        Raises `StreamLostError` if they are lost.
        """
        while frozenset((sender, receiver)) in self._cut:
            self.faults["partition"] += 1
            await self._healed.wait()
        ends = self.line(sender), self.line(receiver)
        if any(end.loss and self._random.random() < end.loss for end in ends):
            self.faults["loss"] += 1
            raise StreamLostError
        now = asyncio.get_running_loop().time()
        sent_time = self._occupy((sender, "up"), now, num_bytes, ends[0])
        received_time = self._occupy((receiver, "down"), now, num_bytes, ends[1])
        if (seconds := max(sent_time, received_time) - now) > 0:
            await asyncio.sleep(seconds)
        return sum(end.latency_seconds for end in ends)

    def _occupy(self, key: tuple[str, str], now: float, num_bytes: int, line: Line) -> float:
        """When a line that carries its transfers one after another is done with this one."""
        start_time = max(now, self._line_free_times.get(key, now))
        self._line_free_times[key] = start_time + num_bytes / line.bandwidth_bytes_per_second
        return self._line_free_times[key]


class _Exchange:
    """One open stream: a server task that fills, and a client that takes, frame by frame."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[FrameKind | None, bytes]] = asyncio.Queue()
        self.room = asyncio.Semaphore(FRAMES_IN_FLIGHT)
        self.task: asyncio.Task[None] | None = None
        self._arrival_time = 0.0

    def deliver(self, kind: FrameKind, frame: bytes, latency_seconds: float) -> None:
        """Let the client have a frame when it arrives, never before the one sent earlier."""
        loop = asyncio.get_running_loop()
        self._arrival_time = max(self._arrival_time, loop.time() + latency_seconds)
        if self._arrival_time > loop.time():
            loop.call_at(self._arrival_time, self.frames.put_nowait, (kind, frame))
        else:
            self.frames.put_nowait((kind, frame))

    def cut(self) -> None:
        """End it now: the client meets a cut stream after what has already arrived."""
        if self.task is not None:
            self.task.cancel()
        self.frames.put_nowait((None, b""))


class MemoryTransport:
    """`peer.transport.Transport` on a `MemoryNetwork`; made by `MemoryNetwork.transport`."""

    def __init__(self, network: MemoryNetwork, peer_id: str) -> None:
        self.peer_id = peer_id
        self.traffic = Traffic()
        self._network = network
        self._handlers: dict[str, tuple[Handler, int]] = {}
        self._incoming = IncomingLimit()
        self._outgoing = OutgoingLimit()
        self._exchanges: set[_Exchange] = set()  # in which this peer is client or server
        self._is_closed = False
        self._context = copy_context()  # of this peer, in which it answers others

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
        exchange = _Exchange()
        async with AsyncExitStack() as stack:
            stack.callback(self._leave, exchange)
            async with deadline(peer_id, timeout_seconds):
                await stack.enter_async_context(self._outgoing.slot(peer_id))
                await self._open(exchange, peer_id, protocol, payload)
                frame = await self._next_frame(exchange, peer_id, max_frame_bytes)
            while frame is not None:
                yield frame
                async with deadline(peer_id, timeout_seconds):
                    frame = await self._next_frame(exchange, peer_id, max_frame_bytes)

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
        self._handlers[protocol] = handler, max_request_bytes

    async def connect(self, maddr: str, *, timeout_seconds: float = 10.0) -> str:
        """See `Transport`. Here an address is anything that ends in `/p2p/ID`."""
        peer_id = maddr.rpartition("/p2p/")[2]
        async with deadline(peer_id, timeout_seconds):
            await self._dial(peer_id, 0)
        return peer_id

    async def close(self) -> None:
        """See `Transport`."""
        self.abort()

    def abort(self) -> None:
        """Stop as a process does that is killed."""
        self._is_closed = True
        if self._network.transports.get(self.peer_id) is self:
            del self._network.transports[self.peer_id]
        for exchange in self._exchanges:
            exchange.cut()
        self._exchanges.clear()
        self._handlers.clear()

    async def _dial(self, peer_id: str, num_bytes: int) -> MemoryTransport:
        """The other end of a new connection, after `num_bytes` have reached it."""
        if self._is_closed:
            raise Unreachable("this peer is not running")
        if peer_id == self.peer_id:
            raise ValueError("a peer does not ask itself")
        try:
            await asyncio.sleep(await self._network.carry(self.peer_id, peer_id, num_bytes))
        except StreamLostError as e:
            raise Unreachable(f"peer {peer_id}: the stream was cut") from e
        server = self._network.transports.get(peer_id)
        if server is None:
            raise Unreachable(f"peer {peer_id} is not running")
        return server

    async def _open(self, exchange: _Exchange, peer_id: str, protocol: str, payload: bytes) -> None:
        peer_id_bytes(peer_id)  # ValueError, as over libp2p
        server = await self._dial(peer_id, HEADER.size + len(payload))
        self.traffic.sent_bytes += HEADER.size + len(payload)
        for end in (self, server):
            end._exchanges.add(exchange)
        exchange.task = asyncio.create_task(
            server._answer(exchange, self.peer_id, protocol, payload),
            context=server._context.copy(),
        )
        exchange.task.add_done_callback(lambda _: server._exchanges.discard(exchange))

    def _leave(self, exchange: _Exchange) -> None:
        self._exchanges.discard(exchange)
        if exchange.task is not None:
            exchange.task.cancel()

    async def _next_frame(
        self, exchange: _Exchange, peer_id: str, max_frame_bytes: int
    ) -> bytes | None:
        """The next data frame, or None after the last one."""
        kind, frame = await exchange.frames.get()
        exchange.room.release()
        if kind is None:
            raise Unreachable(f"peer {peer_id}: the stream was cut")
        self.traffic.received_bytes += HEADER.size + len(frame)
        if kind is FrameKind.ERROR:
            raise RemoteError(peer_id, frame.decode(errors="replace"))
        if len(frame) > max_frame_bytes:
            raise BadMessage(peer_id, f"data frame of {len(frame)} bytes")
        return None if kind is FrameKind.END else frame

    async def _answer(
        self, exchange: _Exchange, client_id: str, protocol: str, payload: bytes
    ) -> None:
        """Serve one request; what the client takes always ends with an end, an error or a cut."""
        self.traffic.received_bytes += HEADER.size + len(payload)
        if protocol not in self._handlers:
            exchange.cut()
            return
        stream = self._incoming.enter(client_id, exchange.cut)
        try:
            if stream is None:
                await self._send(exchange, client_id, FrameKind.ERROR, REFUSAL)
            else:
                stream.is_busy = True  # a request arrives whole here, and no answer is acknowledged
                await self._send_all(exchange, client_id, protocol, payload)
        except StreamLostError:
            exchange.cut()
        finally:
            if stream is not None:
                self._incoming.leave(stream)

    async def _send_all(
        self, exchange: _Exchange, client_id: str, protocol: str, payload: bytes
    ) -> None:
        handler, max_request_bytes = self._handlers[protocol]
        try:
            if len(payload) > max_request_bytes:
                raise BadMessage(client_id, f"request of {len(payload)} bytes")
            async with aclosing(answers(handler, client_id, payload)) as frames:
                async for frame in frames:
                    await self._send(exchange, client_id, FrameKind.DATA, bytes(frame))
            await self._send(exchange, client_id, FrameKind.END, b"")
        except StreamLostError:
            raise
        except Exception as e:  # the task boundary: a handler's error is an answer
            await self._send(exchange, client_id, FrameKind.ERROR, error_text(e))

    async def _send(
        self, exchange: _Exchange, client_id: str, kind: FrameKind, frame: bytes
    ) -> None:
        await exchange.room.acquire()
        num_bytes = HEADER.size + len(frame)
        latency_seconds = await self._network.carry(self.peer_id, client_id, num_bytes)
        self.traffic.sent_bytes += num_bytes
        exchange.deliver(kind, frame, latency_seconds)
