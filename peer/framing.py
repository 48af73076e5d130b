"""The frames on a libp2p stream, and nothing else about it.

    frame    = kind (1 byte) ‖ payload length (4 bytes, big-endian) ‖ payload
    kind     = 0 data, 1 end (no payload), 2 error (UTF-8 text, at most 256 bytes)
    request  = one data frame
    response = data frames, then one end or error frame
    ack      = one byte 0x06 from the client, after which the server closes

The end of a stream never means that a response is complete: p2pd resets a stream once the server
has closed it, and drops what is in flight. Hence the end frame, and hence the acknowledgment.
A length is checked against the reader's limit before anything is read.
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from peer.throttle import URGENT_BYTES
from peer.transport import MAX_ERROR_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from peer.throttle import Meter

HEADER = struct.Struct(">BI")
ACK = b"\x06"


class FrameKind(IntEnum):
    """The first byte of a frame."""

    DATA = 0
    END = 1
    ERROR = 2


class FramingError(ValueError):
    """Bytes that are no frame, or a frame that is larger than the reader allows."""


def frame_header(kind: FrameKind, payload_bytes: int) -> bytes:
    """The five bytes before a payload."""
    return HEADER.pack(kind, payload_bytes)


def parse_header(header: bytes, *, max_frame_bytes: int) -> tuple[FrameKind, int]:
    """(kind, payload length) of a frame with at most `max_frame_bytes` of data; `FramingError`."""
    number, payload_bytes = HEADER.unpack(header)
    try:
        kind = FrameKind(number)
    except ValueError:
        raise FramingError(f"no frame begins with byte {number}") from None
    limits = {
        FrameKind.DATA: max_frame_bytes,
        FrameKind.END: 0,
        FrameKind.ERROR: MAX_ERROR_BYTES,
    }
    if payload_bytes > limits[kind]:
        raise FramingError(
            f"{kind.name.lower()} frame of {payload_bytes} bytes; the limit is {limits[kind]}"
        )
    return kind, payload_bytes


async def read_frame(
    reader: asyncio.StreamReader,
    *,
    max_frame_bytes: int,
    meter: Meter,
    timeout: asyncio.Timeout | None = None,
) -> tuple[FrameKind, bytes]:
    """The next frame. Raises `FramingError`, or `IncompleteReadError` where the stream is cut.

    What the meter takes is added to `timeout`, since that is not the other side's fault.
    """
    header = await reader.readexactly(HEADER.size)
    kind, payload_bytes = parse_header(header, max_frame_bytes=max_frame_bytes)
    urgent = payload_bytes <= URGENT_BYTES
    async with _suspended(timeout):
        await meter.receive(HEADER.size, urgent=urgent)
    slices = []
    for num_bytes in slice_lengths(payload_bytes, meter.down.slice_bytes):
        slices.append(await reader.readexactly(num_bytes))
        async with _suspended(timeout):
            await meter.receive(num_bytes, urgent=urgent)
    return kind, slices[0] if len(slices) == 1 else b"".join(slices)


@asynccontextmanager
async def _suspended(timeout: asyncio.Timeout | None) -> AsyncIterator[None]:
    """Stop the clock of a deadline during the body."""
    when = None if timeout is None else timeout.when()
    if timeout is None or when is None:
        yield
        return
    loop = asyncio.get_running_loop()
    begin = loop.time()
    timeout.reschedule(None)
    yield
    timeout.reschedule(when + loop.time() - begin)


async def write_frame(
    writer: asyncio.StreamWriter,
    kind: FrameKind,
    payload: bytes | memoryview = b"",
    *,
    meter: Meter,
    idle_seconds: float,
) -> None:
    """Send a frame slice by slice; the connection has `idle_seconds` to take each, as soon as the
    meter lets it through. Raises `TimeoutError`, or `OSError` where the stream is cut.
    """
    view = memoryview(payload)
    urgent = len(view) <= URGENT_BYTES
    await meter.send(HEADER.size, urgent=urgent)
    writer.write(frame_header(kind, len(view)))
    start = 0
    for num_bytes in slice_lengths(len(view), meter.up.slice_bytes):
        await meter.send(num_bytes, urgent=urgent)
        writer.write(view[start : start + num_bytes])
        start += num_bytes
        async with asyncio.timeout(idle_seconds):
            await writer.drain()


def slice_lengths(num_bytes: int, slice_bytes: int) -> Iterator[int]:
    """Cut that much into slices."""
    while num_bytes > 0:
        yield min(num_bytes, slice_bytes)
        num_bytes -= slice_bytes
