from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.framing import (
    HEADER,
    FrameKind,
    FramingError,
    frame_header,
    parse_header,
    read_frame,
)
from peer.throttle import Meter


def read_all(raw: bytes, *, max_frame_bytes: int) -> list[tuple[FrameKind, bytes]]:
    """Every frame of a stream that carries `raw` and is then cut."""

    async def main() -> list[tuple[FrameKind, bytes]]:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        frames = []
        while not reader.at_eof():
            frame = await read_frame(reader, max_frame_bytes=max_frame_bytes, meter=Meter())
            frames.append(frame)
        return frames

    return asyncio.run(main())


def test_the_format_to_the_byte() -> None:
    assert frame_header(FrameKind.DATA, 258) == b"\x00\x00\x00\x01\x02"
    assert frame_header(FrameKind.END, 0) == b"\x01\x00\x00\x00\x00"
    assert frame_header(FrameKind.ERROR, 3) == b"\x02\x00\x00\x00\x03"
    raw = b"\x00\x00\x00\x00\x02hi" + b"\x02\x00\x00\x00\x02no" + b"\x01\x00\x00\x00\x00"
    assert read_all(raw, max_frame_bytes=2) == [
        (FrameKind.DATA, b"hi"),
        (FrameKind.ERROR, b"no"),
        (FrameKind.END, b""),
    ]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"\x00\x00\x00\x00\x0b", "data frame of 11 bytes; the limit is 10"),
        (b"\x00\xff\xff\xff\xff", "4294967295"),
        (b"\x01\x00\x00\x00\x01", "end frame"),
        (b"\x02\x00\x00\x01\x01", "error frame of 257"),
        (b"\x03\x00\x00\x00\x00", "begins with byte 3"),
    ],
)
def test_a_header_is_refused_before_anything_is_read(header: bytes, why: str) -> None:
    with pytest.raises(FramingError, match=why):
        parse_header(header, max_frame_bytes=10)


@pytest.mark.parametrize("raw", [b"\x00", b"\x00\x00\x00\x00\x05hell"])
def test_a_cut_stream_is_no_end(raw: bytes) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        read_all(raw, max_frame_bytes=10)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_frames_survive_the_wire(payloads: list[bytes]) -> None:
    raw = b"".join(frame_header(FrameKind.DATA, len(p)) + p for p in payloads)
    assert [payload for _, payload in read_all(raw, max_frame_bytes=50)] == payloads


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size), st.integers(0, 2**33))
def test_no_header_asks_for_more_than_the_limit(header: bytes, max_frame_bytes: int) -> None:
    try:
        _, payload_bytes = parse_header(header, max_frame_bytes=max_frame_bytes)
    except FramingError:
        return
    assert payload_bytes <= max(max_frame_bytes, 256)
