"""The ceiling holds, everyone gets a turn, and what is small does not wait for what is large."""

from __future__ import annotations

import asyncio

import pytest

from peer.throttle import BURST_SECONDS, URGENT_BYTES, Meter, Throttle
from peer.transport import Traffic
from tests.virtual_clock import run_virtual

RATE = 1_000_000.0


def now() -> float:
    return asyncio.get_running_loop().time()


async def send(throttle: Throttle, num_bytes: int, *, urgent: bool = False) -> float:
    """Returns when all of it has passed."""
    for _ in range(0, num_bytes, throttle.slice_bytes):
        await throttle.take(throttle.slice_bytes, urgent=urgent)
    return now()


def test_no_second_carries_more_than_the_rate() -> None:
    async def main() -> None:
        throttle = Throttle(RATE)
        passed: list[tuple[float, int]] = []

        async def stream() -> None:
            for _ in range(100):
                await throttle.take(throttle.slice_bytes, urgent=False)
                passed.append((now(), throttle.slice_bytes))

        await asyncio.gather(*(stream() for _ in range(5)))
        for start, _ in passed:
            window = sum(size for time, size in passed if start <= time < start + 1)
            assert window <= RATE * (1 + BURST_SECONDS) + throttle.slice_bytes
        assert now() == pytest.approx(500 * throttle.slice_bytes / RATE, rel=0.01)

    run_virtual(main())


def test_streams_take_turns() -> None:
    async def main() -> None:
        throttle = Throttle(RATE)
        large = asyncio.create_task(send(throttle, 4_000_000))
        small = asyncio.create_task(send(throttle, 400_000))
        assert await small == pytest.approx(0.8, abs=0.1)
        assert await large == pytest.approx(4.4, abs=0.1)

    run_virtual(main())


def test_small_messages_do_not_wait_for_chunks_and_still_count() -> None:
    async def main() -> None:
        throttle = Throttle(RATE)
        chunks = [asyncio.create_task(send(throttle, 2_000_000)) for _ in range(4)]
        await asyncio.sleep(1)
        begin = now()
        assert await send(throttle, URGENT_BYTES, urgent=True) - begin < 0.1
        assert max(await asyncio.gather(*chunks)) == pytest.approx(8 + URGENT_BYTES / RATE, abs=0.2)

    run_virtual(main())


def test_even_small_messages_alone_keep_to_the_rate() -> None:
    async def main() -> None:
        throttle = Throttle(RATE)
        senders = (throttle.take(1000, urgent=True) for _ in range(5000))
        await asyncio.gather(*senders)
        assert now() == pytest.approx(5, abs=0.1)

    run_virtual(main())


def test_what_cannot_be_held_back_is_paid_for_by_chunks() -> None:
    async def main() -> None:
        meter = Meter(RATE)
        meter.called(500_000, 250_000)
        await meter.send(100_000, urgent=False)
        assert 0.45 < now() < 0.75
        assert meter.traffic.wire_sent_bytes > 600_000 * (1 + Traffic.HEADER_SHARE)
        assert meter.traffic.wire_received_bytes < meter.traffic.wire_sent_bytes

    run_virtual(main())


def test_without_a_ceiling_nothing_waits() -> None:
    async def main() -> None:
        meter = Meter()
        for _ in range(100):
            await meter.send(2**30, urgent=False)
            await meter.receive(2**30, urgent=False)
        assert now() == 0.0
        assert meter.traffic.sent_bytes == 100 * 2**30

    run_virtual(main())
