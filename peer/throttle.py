"""A ceiling on what a peer sends and receives, and the account of it.

Every slice of a frame passes its direction's `Throttle`, both ways. Small messages go first: they
wait for one another only, while whole chunks wait for everything. What cannot be held back (the
DHT's messages, and acknowledgments by TCP) is charged, and chunks wait the longer for it.
"""

from __future__ import annotations

import asyncio
import math

from peer.transport import Traffic

URGENT_BYTES = 64 * 1024  # frames of at most that go ahead of larger ones
BURST_SECONDS = 0.05  # of the rate, that may pass at once after a silence
SLICE_SECONDS = 0.02  # of the rate, that one stream passes before it is another one's turn
MIN_SLICE_BYTES = 4 * 1024
MAX_SLICE_BYTES = 2**20
BUFFER_BYTES = 2**20  # read ahead of a stream, for speed
LIMITED_BUFFER_BYTES = 2**15  # what is read ahead has come through the line already
HEADROOM = 0.95  # of the ceiling is used: libp2p's own messages and repeated packets need the rest


class Throttle:
    """One direction: lets through `bytes_per_second` on average, in slices."""

    def __init__(self, bytes_per_second: float = math.inf) -> None:
        self._rate = bytes_per_second
        self._free_time = 0.0  # when all that has passed so far will have been worth its bytes
        self._urgent_free_time = 0.0  # the same, of urgent bytes alone
        self._turn = asyncio.Lock()  # among those that are not urgent: first come, first served

    @property
    def slice_bytes(self) -> int:
        """How much of a large frame may pass at a time."""
        if math.isinf(self._rate):
            return MAX_SLICE_BYTES
        return min(MAX_SLICE_BYTES, max(MIN_SLICE_BYTES, int(self._rate * SLICE_SECONDS)))

    def charge(self, num_bytes: float) -> None:
        """Count what passes without asking."""
        if math.isinf(self._rate):
            return
        self._free_time = max(self._free_time, self._now() - BURST_SECONDS) + num_bytes / self._rate

    async def take(self, num_bytes: float, *, urgent: bool) -> None:
        """Wait until that much more may pass. Bounded by the rate and by the streams there are."""
        if math.isinf(self._rate):
            return
        if urgent:
            self.charge(num_bytes)
            now = self._now()
            self._urgent_free_time = max(self._urgent_free_time, now - BURST_SECONDS)
            self._urgent_free_time += num_bytes / self._rate
            await asyncio.sleep(max(0.0, self._urgent_free_time - now))
            return
        async with self._turn:
            # Again after each wait, since urgent bytes may have passed meanwhile.
            while (seconds := self._free_time - self._now()) > 0:  # noqa: ASYNC110 - no event
                await asyncio.sleep(seconds)
            self.charge(num_bytes)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class Meter:
    """Both directions of one peer; every byte goes through it, and into `traffic`."""

    def __init__(self, max_bytes_per_second: float = math.inf) -> None:
        self.traffic = Traffic()
        self.up = Throttle(max_bytes_per_second * HEADROOM)
        self.down = Throttle(max_bytes_per_second * HEADROOM)
        is_limited = not math.isinf(max_bytes_per_second)
        self.buffer_bytes = LIMITED_BUFFER_BYTES if is_limited else BUFFER_BYTES  # of one stream

    async def send(self, num_bytes: int, *, urgent: bool) -> None:
        """Wait until that much of a frame may be sent, and count it."""
        self.traffic.sent_bytes += num_bytes
        await self._pass(self.up, self.down, num_bytes, urgent=urgent)

    async def receive(self, num_bytes: int, *, urgent: bool) -> None:
        """Count what was read of a frame, and wait until the next part may be."""
        self.traffic.received_bytes += num_bytes
        await self._pass(self.down, self.up, num_bytes, urgent=urgent)

    def opened(self) -> None:
        """Count a stream, which costs some bytes either way before its first frame."""
        self.traffic.num_streams += 1
        for throttle in (self.up, self.down):
            throttle.charge(Traffic.STREAM_BYTES)

    def called(self, sent_bytes: int, received_bytes: int) -> None:
        """Count an exchange of messages that went past the transport: the DHT's."""
        self.opened()
        self.traffic.dht_sent_bytes += sent_bytes
        self.traffic.dht_received_bytes += received_bytes
        self.up.charge(sent_bytes)
        self.down.charge(received_bytes)

    async def _pass(
        self, throttle: Throttle, other: Throttle, num_bytes: int, *, urgent: bool
    ) -> None:
        other.charge(num_bytes * Traffic.ACK_SHARE)
        await throttle.take(num_bytes * (1 + Traffic.HEADER_SHARE), urgent=urgent)
