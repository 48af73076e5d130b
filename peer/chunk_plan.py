"""Which chunks of a blob to ask of which source: pure functions of what is under way.

Each source is asked for a run of chunks, short enough that all end at about the same time, and
asked again shortly before it is done. Nobody else is asked while those that are will be done in no
time, since every request costs something. A source chooses out of more chunks than it is to send;
those are not asked of others meanwhile, so that nothing comes twice until the end: then an idle
source is asked for what a much slower one still owes, and the first answer wins.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from random import Random

from dipaco.digest import CHUNK_BYTES
from peer.blob_server import MAX_CHUNKS_PER_REQUEST, WINDOW_CHUNKS

MAX_SOURCES = 4  # asked at once for one blob
RUN_SECONDS = 4.0  # that one request should take: it hides a round trip, and leaves some to share
FIRST_RUN_CHUNKS = 1  # of a source whose bandwidth is not known
GRANT_SECONDS = 2.0  # for a source to choose, before others are asked for the same chunks
CHUNK_SECONDS = 1.0  # of a source whose bandwidth is not known
SHORT_SECONDS = 2.0  # that all the rest will take: then nobody else is asked
HEDGE = 3.0  # an idle source takes over a chunk that it would bring so many times sooner
HEDGE_SECONDS = 0.25  # between two looks at whether it would


@dataclass(slots=True, eq=False)
class Run:
    """One request under way."""

    wanted: list[int]
    last_time: float  # when it was asked, granted, or last brought a chunk
    is_granted: bool = False
    due: list[int] = field(default_factory=list)  # chunks granted, needed, and not here yet


@dataclass(slots=True, eq=False)
class Source:
    """One peer in its part as a source of one blob."""

    peer: str
    runs: list[Run] = field(default_factory=list)  # two at most: the next is asked for in time
    ready_time: float = 0.0
    num_faults: int = 0  # since its last chunk
    num_empty: int = 0  # times that it had nothing, since its last chunk
    is_dropped: bool = False
    last_end_time: float = 0.0  # of a run


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What there is to plan with."""

    sources: Sequence[Source]  # that may be asked, the best first
    missing: Set[int] | None  # chunks; None while not even the index is here
    rates: Mapping[str, float]  # bytes/s, by peer, as far as known
    now: float

    def chunk_seconds(self, source: Source) -> float:
        """How long a chunk of `source` takes."""
        rate = self.rates.get(source.peer)
        return CHUNK_SECONDS if rate is None else CHUNK_BYTES / rate


@dataclass(frozen=True, slots=True)
class Choice:
    """What a source is asked for: `num_chunks` at most of `chunks`, which are sorted."""

    chunks: Sequence[int]
    num_chunks: int


def has_room(source: Source) -> bool:
    """Whether it may be asked: it has nothing to do, or almost nothing and is known to be good."""
    return not source.runs or (
        source.last_end_time > 0.0
        and len(source.runs) == 1
        and source.runs[0].is_granted
        and len(source.runs[0].due) <= 1
    )


def is_nearly_done(view: View) -> bool:
    """Whether those that are asked will be done in no time, as far as they answer."""
    busy = [
        source
        for source in view.sources
        if any(view.now - run.last_time < HEDGE_SECONDS for run in source.runs)
    ]
    if view.missing is None:
        return bool(busy)
    rates = [view.rates.get(source.peer, 0.0) for source in busy]
    return len(view.missing) * CHUNK_BYTES < SHORT_SECONDS * sum(rates)


def choose_chunks(source: Source, view: View, random: Random) -> Choice | None:
    """What to ask `source` for, once the index is here; None if nothing now."""
    assert view.missing is not None, "chunks are chosen once the index is here"
    runs = [run for other in view.sources for run in other.runs]
    taken = {chunk for run in runs for chunk in run.due}
    asked = {
        chunk
        for run in runs
        if not run.is_granted and view.now - run.last_time < GRANT_SECONDS
        for chunk in run.wanted
    }
    free = sorted(view.missing - taken - asked)
    if free:
        free = [chunk for chunk in free if chunk < free[0] + WINDOW_CHUNKS]
        num_chunks = _run_chunks(source, view, len(free))
        # A choice for the source, which leaves one for the next source to be asked.
        chunks = random.sample(free, max(num_chunks, len(free) // 2))
        return Choice(sorted(chunks), num_chunks)
    if asked or source.runs:
        return None
    chunk = _late_chunk(source, view)
    return None if chunk is None else Choice([chunk], 1)


def _run_chunks(source: Source, view: View, num_free: int) -> int:
    """How many chunks to ask for: its share of what is left, and no more than a run."""
    rate = view.rates.get(source.peer)
    run = FIRST_RUN_CHUNKS if rate is None else round(rate * RUN_SECONDS / CHUNK_BYTES)
    if rate is not None and num_free * CHUNK_BYTES < SHORT_SECONDS * rate:
        return min(run, num_free, MAX_CHUNKS_PER_REQUEST)  # nobody else will be asked
    useful = [s for s in view.sources if s is source or s.runs or s.ready_time <= view.now]
    seconds = {s.peer: view.chunk_seconds(s) for s in useful[:MAX_SOURCES]}
    speed = sum(1 / each for each in seconds.values())
    share = math.ceil(num_free / (speed * view.chunk_seconds(source)))
    return max(1, min(run, share, num_free, MAX_CHUNKS_PER_REQUEST))


def _late_chunk(source: Source, view: View) -> int | None:
    """The chunk that another source would bring last, if `source` would bring it far sooner."""
    asked_for = [chunk for other in view.sources for run in other.runs for chunk in run.due]
    waits: list[tuple[float, int]] = []
    for other in view.sources:
        position = 0
        for run in other.runs:
            late_seconds = view.now - run.last_time
            for chunk in run.due:
                position += 1
                seconds = position * view.chunk_seconds(other) - late_seconds
                waits.append((max(seconds, late_seconds), chunk))
    limit = HEDGE * max(view.chunk_seconds(source), HEDGE_SECONDS)
    waits = [wait for wait in waits if wait[0] > limit and asked_for.count(wait[1]) == 1]
    return max(waits)[1] if waits else None
