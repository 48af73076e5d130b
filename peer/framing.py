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

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from peer.transport import MAX_ERROR_BYTES

if TYPE_CHECKING:
    import asyncio

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
    reader: asyncio.StreamReader, *, max_frame_bytes: int
) -> tuple[FrameKind, bytes]:
    """The next frame. Raises `FramingError`, or `IncompleteReadError` where the stream is cut."""
    header = await reader.readexactly(HEADER.size)
    kind, payload_bytes = parse_header(header, max_frame_bytes=max_frame_bytes)
    return kind, await reader.readexactly(payload_bytes) if payload_bytes else b""


async def write_frame(
    writer: asyncio.StreamWriter, kind: FrameKind, payload: bytes | memoryview = b""
) -> None:
    """Send a frame, and wait until the connection has room again."""
    writer.write(frame_header(kind, len(payload)))
    if payload:
        writer.write(payload)
    await writer.drain()
