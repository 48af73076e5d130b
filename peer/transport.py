"""The door to other peers: one request, a stream of frames back. Two implementations keep it:
`peer.rpc` over libp2p, and the in-memory twin `peer.memory`.

Errors a caller meets: `Unreachable` (the dial failed, the stream was cut, a deadline passed),
`BadMessage` (the other side broke the framing or a size limit) and `RemoteError` (it answered with
an error). Every wait has a deadline and every buffer a size, on both sides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from dht.errors import BadMessage, PeerFault, SwarmError, Unreachable

log = logging.getLogger(__name__)

MAX_ERROR_BYTES = 256  # of text in an error frame
MAX_STREAMS_PER_PEER = 16  # that one peer may have open with us at a time; more are refused
MAX_STREAMS = 256  # that all peers together may have open with us; for one more, room is made
IDLE_WEIGHT = 4  # a stream that waits for its peer counts as if that had so many more
MAX_OUTGOING_STREAMS_PER_PEER = 8  # of ours; more wait. Half, since closing ones still count there
IDLE_SECONDS = 30.0  # for the other side to send its request, take a frame, or acknowledge
HANDLER_SECONDS = 120.0  # for a handler to come up with its next frame
MAX_REFUSALS = 64  # streams that wait until the other side has read why; more are just cut
REFUSAL_SECONDS = 5.0  # for it to read that
REFUSAL = b"too many streams at a time"

Handler = Callable[[str, bytes], AsyncIterator[bytes | memoryview]]
"""Answers (peer ID of the asker, request) with frames. What it raises becomes an error frame."""


class RemoteError(PeerFault):
    """The other side answered with an error; `why` is its text, at most 256 bytes."""


@dataclass(kw_only=True, slots=True)
class Traffic:
    """What went through since the start, both as client and as server.

    `sent_bytes` and `received_bytes` are of frames, with their headers. `wire_…` is about what the
    network interface counts: with the DHT, and the headers of all layers below.
    """

    HEADER_SHARE: ClassVar = 0.055  # of what is sent: 78 of 1526 bytes per packet, and encryption
    ACK_SHARE: ClassVar = 0.015  # of what is received, sent back: 66 bytes for several packets
    STREAM_BYTES: ClassVar = 400  # either way, to agree on a protocol and to part

    sent_bytes: int = 0
    received_bytes: int = 0
    dht_sent_bytes: int = 0
    dht_received_bytes: int = 0
    num_streams: int = 0

    @property
    def wire_sent_bytes(self) -> int:
        """What the network interface has sent for this peer."""
        return self._wire_bytes(
            self.sent_bytes + self.dht_sent_bytes, self.received_bytes + self.dht_received_bytes
        )

    @property
    def wire_received_bytes(self) -> int:
        """What the network interface has received for this peer."""
        return self._wire_bytes(
            self.received_bytes + self.dht_received_bytes, self.sent_bytes + self.dht_sent_bytes
        )

    def _wire_bytes(self, there: int, back: int) -> int:
        streams = self.num_streams * self.STREAM_BYTES
        return round(there * (1 + self.HEADER_SHARE) + back * self.ACK_SHARE + streams)


class Transport(Protocol):
    """One peer's access to all other peers."""

    @property
    def peer_id(self) -> str:
        """Who the others see."""

    @property
    def traffic(self) -> Traffic:
        """What went through this transport so far."""

    def stream(
        self,
        peer_id: str,
        protocol: str,
        payload: bytes,
        *,
        timeout_seconds: float,
        max_frame_bytes: int,
    ) -> AsyncGenerator[bytes, None]:
        """Ask `peer_id`, and yield its frames until it has said that there are no more.

        `timeout_seconds` is for each frame (the first includes dialing). Leave early only under
        `contextlib.aclosing`, so that the stream is closed at once.
        """

    async def request(
        self,
        peer_id: str,
        protocol: str,
        payload: bytes,
        *,
        timeout_seconds: float,
        max_response_bytes: int,
    ) -> bytes:
        """Ask `peer_id` for exactly one frame; `timeout_seconds` is for the whole exchange."""

    async def serve(self, protocol: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer every request of `protocol` of at most that size with `handler`, until closed."""

    async def connect(self, maddr: str, *, timeout_seconds: float = 10.0) -> str:
        """Dial an address `/ip4/…/tcp/…/p2p/ID`; returns the peer ID. Raises `Unreachable`."""

    async def close(self) -> None:
        """Cut every stream and stop serving. Does nothing the second time."""


@asynccontextmanager
async def deadline(peer_id: str, seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """Raise `Unreachable` if the body, which waits for `peer_id`, takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except TimeoutError as e:
        raise Unreachable(f"peer {peer_id} did not answer within {seconds:g} s") from e


async def only_frame(peer_id: str, frames: AsyncGenerator[bytes, None], seconds: float) -> bytes:
    """The one frame of `frames`, which are `peer_id`'s; `BadMessage` if there are none or more."""
    async with deadline(peer_id, seconds), aclosing(frames):
        async for frame in frames:
            async for _ in frames:
                raise BadMessage(peer_id, "answered with several frames, where one was due")
            return frame
        raise BadMessage(peer_id, "answered with no frame, where one was due")


async def answers(
    handler: Handler, peer_id: str, payload: bytes
) -> AsyncGenerator[bytes | memoryview, None]:
    """The frames of `handler`, each within `HANDLER_SECONDS`; closes it, whatever happens."""
    frames = handler(peer_id, payload)
    try:
        while True:
            async with asyncio.timeout(HANDLER_SECONDS):
                frame = await anext(frames, None)
            if frame is None:
                return
            yield frame
    finally:
        if isinstance(frames, AsyncGenerator):
            await frames.aclose()


def error_text(error: Exception) -> bytes:
    """What the asker is told of an error in a handler. A bug of ours stays with us, in the log."""
    if isinstance(error, SwarmError | ValueError | TimeoutError):
        return str(error).encode(errors="replace")[:MAX_ERROR_BYTES]
    is_bug = not isinstance(
        error, OSError
    )  # a full disk is none, and asked for many times a second
    log.error("a request handler failed: %s", error, exc_info=error if is_bug else None)
    return b"internal error"


@dataclass(eq=False, kw_only=True, slots=True)
class IncomingStream:
    """A stream that another peer has open with us."""

    peer_id: str
    cut: Callable[[], object]
    is_busy: bool = False  # we have its whole request, and it still lacks some of our answer


class IncomingLimit:
    """Shares out the streams that others may have open with us.

    Where there are too many, one is taken from who has most of them for who has fewer; first of all
    one that says nothing, so that strangers who do no more than that keep nobody out.
    """

    def __init__(self) -> None:
        self._streams: dict[IncomingStream, None] = {}  # the oldest first

    def enter(self, peer_id: str, cut: Callable[[], object]) -> IncomingStream | None:
        """One more stream of `peer_id`, which must `leave` later; None if it may have no more.

        `cut` ends the stream; it may be called at any time, and once at most.
        """
        num_streams = Counter(stream.peer_id for stream in self._streams)
        if num_streams[peer_id] >= MAX_STREAMS_PER_PEER:
            return None
        if len(self._streams) >= MAX_STREAMS:

            def weight(stream: IncomingStream) -> int:
                return num_streams[stream.peer_id] + (0 if stream.is_busy else IDLE_WEIGHT)

            heaviest = max(self._streams, key=lambda s: (weight(s), not s.is_busy))
            if weight(heaviest) <= num_streams[peer_id] + 1:
                return None
            self.leave(heaviest)
            heaviest.cut()
        stream = IncomingStream(peer_id=peer_id, cut=cut)
        self._streams[stream] = None
        return stream

    def leave(self, stream: IncomingStream) -> None:
        """It is over, by itself or cut."""
        self._streams.pop(stream, None)


class OutgoingLimit:
    """Makes our own streams to one peer wait for one another, so that it never refuses one."""

    def __init__(self) -> None:
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._num_users: dict[str, int] = {}

    @asynccontextmanager
    async def slot(self, peer_id: str) -> AsyncIterator[None]:
        """Wait until we may have one more stream with `peer_id`, and have it during the body."""
        slots = self._slots.setdefault(peer_id, asyncio.Semaphore(MAX_OUTGOING_STREAMS_PER_PEER))
        self._num_users[peer_id] = self._num_users.get(peer_id, 0) + 1
        try:
            async with slots:
                yield
        finally:
            self._num_users[peer_id] -= 1
            if not self._num_users[peer_id]:
                del self._num_users[peer_id], self._slots[peer_id]
