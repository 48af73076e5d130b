"""What this peer knows of others as sources of blobs: measured bandwidth, and faults of late.

One `Sources` is shared by all fetches of a peer, so that what one of them learns serves the next.
Nothing that another peer says of itself counts here; only what arrived, and how long that took.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dipaco.digest import CHUNK_BYTES

MAX_PEERS = 4096  # remembered; the one longest unheard of is forgotten first
NEWEST_SHARE = 0.3  # of a new measurement in the moving average
MIN_MEASURED_BYTES = 2**18  # less tells of the latency, not of the bandwidth
FAULTS_TO_SKIP = 3  # one after another; then the source is skipped for a while
SAME_FAULT_SECONDS = 1.0  # in which several count once: what cuts a line cuts every stream on it
SKIP_SECONDS = 15.0  # at first; each further fault doubles it
MAX_SKIP_SECONDS = 240.0
DOUBT_SECONDS = 60.0  # after a fault, in which what a peer points to is not followed
MAX_DOUBLINGS = 32  # of a pause; a float overflows at the 1024th

FRAME_TIMEOUT_SECONDS = 30.0  # for one chunk: 35 kB/s is the slowest useful source
MIN_FRAME_TIMEOUT_SECONDS = 5.0  # a line may stall that long, and still be a good one
SLOWDOWN = 8.0  # against what was measured, e.g. by others who ask for the same; then it is late


def doubled(seconds: float, times: int, max_seconds: float) -> float:
    """`seconds`, doubled so many times, but never more than `max_seconds`."""
    return min(seconds * 2.0 ** min(times, MAX_DOUBLINGS), max_seconds)


@dataclass(slots=True)
class _Source:
    bytes_per_second: float | None = None
    num_faults: int = 0  # since it last brought something
    fault_time: float = -math.inf  # of the last one that counted
    skipped_until: float = 0.0


class Sources:
    """A peer's memory of its sources. `now` is the time of the event loop, in seconds."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def brought(self, peer: str, num_bytes: int, seconds: float) -> None:
        """`peer` has sent good bytes: its faults are forgiven, its bandwidth is averaged."""
        source = self._source(peer)
        source.num_faults, source.skipped_until = 0, 0.0
        if num_bytes < MIN_MEASURED_BYTES:
            return
        measured = num_bytes / max(seconds, 1e-6)
        before = source.bytes_per_second
        if before is None:
            source.bytes_per_second = measured
        else:
            source.bytes_per_second = before + NEWEST_SHARE * (measured - before)

    def failed(self, peer: str, now: float) -> None:
        """`peer` was unreachable, late or wrong."""
        source = self._source(peer)
        if now - source.fault_time < SAME_FAULT_SECONDS:
            return
        source.fault_time = now
        source.num_faults += 1
        if source.num_faults >= FAULTS_TO_SKIP:
            times = source.num_faults - FAULTS_TO_SKIP
            source.skipped_until = now + doubled(SKIP_SECONDS, times, MAX_SKIP_SECONDS)

    def bytes_per_second(self, peer: str) -> float | None:
        """What `peer` sends us, as measured; None if it never was."""
        source = self._sources.get(peer)
        return None if source is None else source.bytes_per_second

    def num_faults(self, peer: str) -> int:
        """Faults of `peer` since it last brought something."""
        source = self._sources.get(peer)
        return 0 if source is None else source.num_faults

    def ranked(self, peers: Sequence[str], now: float) -> list[str]:
        """The best first: without faults, then fast, then as given. One never measured counts as
        average, and of two that are less than about twice as fast as one another neither is better.
        Whom to skip for now comes last: it is for who has no other.
        """
        known = [rate for peer in peers if (rate := self.bytes_per_second(peer)) is not None]
        average = statistics.median(known) if known else 0.0

        def rank(peer: str) -> tuple[bool, int, int]:
            source = self._sources.get(peer, _Source())
            rate = average if source.bytes_per_second is None else source.bytes_per_second
            return source.skipped_until > now, source.num_faults, -round(math.log2(max(rate, 1.0)))

        return sorted(dict.fromkeys(peers), key=rank)

    def is_skipped(self, peer: str, now: float) -> bool:
        """Whether `peer` has failed so often of late that others should be asked instead."""
        source = self._sources.get(peer)
        return source is not None and source.skipped_until > now

    def is_doubtful(self, peer: str, now: float) -> bool:
        """Whether `peer` has failed within `DOUBT_SECONDS`, and brought nothing since."""
        source = self._sources.get(peer)
        return bool(source and source.num_faults and now - source.fault_time < DOUBT_SECONDS)

    def frame_seconds(self, peer: str) -> float:
        """How long to wait for one chunk of `peer`."""
        rate = self.bytes_per_second(peer)
        if rate is None:
            return FRAME_TIMEOUT_SECONDS
        seconds = SLOWDOWN * CHUNK_BYTES / rate
        return min(FRAME_TIMEOUT_SECONDS, max(MIN_FRAME_TIMEOUT_SECONDS, seconds))

    def _source(self, peer: str) -> _Source:
        source = self._sources.pop(peer, None) or _Source()
        self._sources[peer] = source
        while len(self._sources) > MAX_PEERS:
            del self._sources[next(iter(self._sources))]
        return source
