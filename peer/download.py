"""The download of one blob from several sources at once.

Each source is asked for a run of chunks, short enough that all end at about the same time, and
asked again shortly before it is done. Nobody else is asked while those that are will be done in no
time, since every request costs something. A source chooses out of more chunks than it is to send;
those are not asked of others meanwhile, so that nothing comes twice until the end: then an idle
source is asked for what a much slower one still owes, and the first answer wins. Chunks that came
before a stream was cut stay. A source without anything for us is asked again a little later.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dht.errors import BadBlob, LocalFault, Offline, PeerFault, Unreachable
from dipaco.digest import CHUNK_BYTES, BlobIndex
from peer.blob_server import (
    BLOB_PROTOCOL,
    MAX_CHUNKS_PER_REQUEST,
    WINDOW_CHUNKS,
    BlobRequest,
    chunk_bits,
    chunks_of,
)
from peer.store import MAX_INDEX_BYTES, BlobStore, PartialBlob

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from peer.faults import Faults
    from peer.sources import Sources
    from peer.transport import Transport

MAX_SOURCES = 4  # asked at once for one blob
MAX_SOURCES_KNOWN = 64  # of one blob; more are not listened to
MAX_FAULTS_PER_SOURCE = 3  # without a chunk in between: then it is dropped for this blob
RUN_SECONDS = 4.0  # that one request should take: it hides a round trip, and leaves some to share
FIRST_RUN_CHUNKS = 1  # of a source whose bandwidth is not known
GRANT_SECONDS = 2.0  # for a source to choose, before others are asked for the same chunks
PAUSE_SECONDS = (
    0.25  # before a source that failed, or had nothing, is asked again; doubled each time
)
MAX_PAUSE_SECONDS = 2.0
PATIENCE_SECONDS = 10.0  # with sources that all lack the rest, and nothing under way
STALL_SECONDS = 60.0  # without a chunk: the sources are none, however many there are
CHUNK_SECONDS = 1.0  # of a source whose bandwidth is not known
SHORT_SECONDS = 2.0  # that all the rest will take: then nobody else is asked
HEDGE = 3.0  # an idle source takes over a chunk that it would bring so many times sooner
HEDGE_SECONDS = 0.25  # between two looks at whether it would


@dataclass(slots=True, eq=False)
class _Run:
    """One request under way."""

    wanted: list[int]
    last_time: float  # when it was asked, granted, or last brought a chunk
    is_granted: bool = False
    due: list[int] = field(default_factory=list)  # chunks granted, needed, and not here yet
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Source:
    """One peer in its part as a source of this blob."""

    peer: str
    runs: list[_Run] = field(default_factory=list)  # two at most: the next is asked for in time
    ready_time: float = 0.0
    num_faults: int = 0  # since its last chunk
    num_empty: int = 0  # times that it had nothing, since its last chunk
    is_dropped: bool = False
    last_end_time: float = 0.0  # of a run


class Download:
    """Brings one blob into the store; see `BlobClient.fetch` for what its caller meets."""

    def __init__(
        self,
        digest: str,
        *,
        store: BlobStore,
        transport: Transport,
        faults: Faults,
        sources: Sources,
        max_bytes: int,
    ) -> None:
        self._digest = digest
        self._store = store
        self._transport = transport
        self._faults = faults
        self._known = sources
        self._max_bytes = max_bytes
        self._sources: dict[str, _Source] = {}
        self._part: PartialBlob | None = None
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._last_chunk_time = 0.0
        self._stall_time = math.inf  # when it is given up, unless a chunk or a new source comes
        self._random = random.Random(f"{transport.peer_id} {digest}")  # others choose otherwise

    def allow(self, max_bytes: int) -> None:
        """Take up to so many bytes, if that is more: the largest that a caller has asked for."""
        self._max_bytes = max(self._max_bytes, max_bytes)

    def add(self, peers: Iterable[str]) -> None:
        """Take further peers for sources."""
        for peer in peers:
            if peer not in self._sources and len(self._sources) < MAX_SOURCES_KNOWN:
                self._sources[peer] = _Source(peer)
                self._stall_time = self._now() + STALL_SECONDS
        self._changed.set()

    async def run(self) -> None:
        """Until the blob is in the store; takes as long as its bytes do.

        Raises `Unreachable` once the sources have proven to be none.
        """
        self._last_chunk_time = self._now()
        try:
            index = self._store.index(self._digest)
            if index is not None:
                self._open(index)
            while self._part is None or self._part.missing:
                self._changed.clear()
                await self._wait(self._launch())
                if self._failure is not None:
                    raise self._failure
            self._part.finish()
        except OSError as error:
            raise _disk_fault(error) from error
        finally:
            tasks = [task for s in self._sources.values() for task in _stop(s.runs)]
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._part is not None:
                self._part.close()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _open(self, index: BlobIndex) -> None:
        """The index is here: chunks can be asked for, and nobody needs to bring it any more."""
        self._part = self._store.open_part(index)
        for source in self._sources.values():
            _stop([run for run in source.runs if run.task is not asyncio.current_task()])

    async def _wait(self, seconds: float) -> None:
        """Until something has happened, or it is time to look again."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _launch(self) -> float:
        """Ask whom there is something to ask; returns when to look again at the latest, in seconds.

        Raises `Unreachable` when there is nobody left to hope for.
        """
        now = self._now()
        alive = self._alive(now)
        self._check_hope(alive, now)
        num_active = sum(bool(source.runs) for source in alive)
        look_seconds = min(PATIENCE_SECONDS, max(HEDGE_SECONDS, self._stall_time - now))
        for source in alive:
            if source.ready_time > now:
                look_seconds = min(look_seconds, source.ready_time - now)
            elif _has_room(source) and (source.runs or num_active < MAX_SOURCES):
                is_needed = bool(source.runs) or not self._is_nearly_done(alive, now)
                request = self._request(source, alive, now) if is_needed else None
                if request is None:
                    look_seconds = min(look_seconds, HEDGE_SECONDS)
                else:
                    num_active += not source.runs
                    self._ask(source, request, now)
        return look_seconds

    def _alive(self, now: float) -> list[_Source]:
        """Sources that may be asked, the best first."""
        alive = [s for s in self._sources.values() if not s.is_dropped]
        good = [s for s in alive if s.runs or not self._known.is_skipped(s.peer, now)]
        if any(s.runs or not s.num_empty for s in good):
            alive = good
        ranked = self._known.ranked([s.peer for s in alive], now)
        return [self._sources[peer] for peer in ranked]

    def _check_hope(self, alive: list[_Source], now: float) -> None:
        if now >= self._stall_time:
            raise Unreachable(f"nothing of {self._digest[:12]} came for {STALL_SECONDS:.0f} s")
        if any(source.runs for source in alive):
            return
        if self._part is None:
            if all(source.num_empty for source in alive):
                raise Unreachable(f"none of the peers asked has blob {self._digest[:12]}")
        elif not alive or (
            all(source.num_empty for source in alive)
            and now - self._last_chunk_time > PATIENCE_SECONDS
        ):
            num_missing = len(self._part.missing)
            raise Unreachable(f"{num_missing} chunks of {self._digest[:12]} found nowhere")

    def _is_nearly_done(self, alive: list[_Source], now: float) -> bool:
        """Whether those that are asked will be done in no time, as far as they answer."""
        busy = [
            source
            for source in alive
            if any(now - run.last_time < HEDGE_SECONDS for run in source.runs)
        ]
        if self._part is None:
            return bool(busy)
        rates = [self._known.bytes_per_second(source.peer) or 0.0 for source in busy]
        return len(self._part.missing) * CHUNK_BYTES < SHORT_SECONDS * sum(rates)

    def _request(self, source: _Source, alive: list[_Source], now: float) -> BlobRequest | None:
        """What to ask `source` for; None if nothing now."""
        if self._part is None:
            return None if source.runs else BlobRequest(digest=self._digest)
        runs = [run for other in alive for run in other.runs]
        taken = {chunk for run in runs for chunk in run.due}
        asked = {
            chunk
            for run in runs
            if not run.is_granted and now - run.last_time < GRANT_SECONDS
            for chunk in run.wanted
        }
        free = sorted(self._part.missing - taken - asked)
        if free:
            free = [chunk for chunk in free if chunk < free[0] + WINDOW_CHUNKS]
            num_chunks = self._run_chunks(source, alive, len(free), now)
            # A choice for the source, which leaves one for the next source to be asked.
            choice = self._random.sample(free, max(num_chunks, len(free) // 2))
            return self._request_for(sorted(choice), num_chunks)
        if asked or source.runs:
            return None
        chunk = self._late_chunk(source, alive, now)
        return None if chunk is None else self._request_for([chunk], 1)

    def _request_for(self, chunks: list[int], num_chunks: int) -> BlobRequest:
        return BlobRequest(
            digest=self._digest,
            first_chunk=chunks[0],
            num_chunks=num_chunks,
            wanted=chunk_bits(chunks, chunks[0]).hex(),
        )

    def _run_chunks(self, source: _Source, alive: list[_Source], num_free: int, now: float) -> int:
        """How many chunks to ask for: its share of what is left, and no more than a run."""
        rate = self._known.bytes_per_second(source.peer)
        run = FIRST_RUN_CHUNKS if rate is None else round(rate * RUN_SECONDS / CHUNK_BYTES)
        if rate is not None and num_free * CHUNK_BYTES < SHORT_SECONDS * rate:
            return min(run, num_free, MAX_CHUNKS_PER_REQUEST)  # nobody else will be asked
        useful = [s for s in alive if s is source or s.runs or s.ready_time <= now][:MAX_SOURCES]
        seconds = {s.peer: self._chunk_seconds(s) for s in useful}
        speed = sum(1 / seconds[s.peer] for s in useful)
        share = math.ceil(num_free / (speed * self._chunk_seconds(source)))
        return max(1, min(run, share, num_free, MAX_CHUNKS_PER_REQUEST))

    def _late_chunk(self, source: _Source, alive: list[_Source], now: float) -> int | None:
        """The chunk that another source would bring last, if `source` would bring it far sooner."""
        asked_for = [chunk for other in alive for run in other.runs for chunk in run.due]
        waits: list[tuple[float, int]] = []
        for other in alive:
            position = 0
            for run in other.runs:
                late_seconds = now - run.last_time
                for chunk in run.due:
                    position += 1
                    seconds = position * self._chunk_seconds(other) - late_seconds
                    waits.append((max(seconds, late_seconds), chunk))
        limit = HEDGE * max(self._chunk_seconds(source), HEDGE_SECONDS)
        waits = [wait for wait in waits if wait[0] > limit and asked_for.count(wait[1]) == 1]
        return max(waits)[1] if waits else None

    def _chunk_seconds(self, source: _Source) -> float:
        rate = self._known.bytes_per_second(source.peer)
        return CHUNK_SECONDS if rate is None else CHUNK_BYTES / rate

    def _ask(self, source: _Source, request: BlobRequest, now: float) -> None:
        run = _Run(request.chunks, now)
        source.runs.append(run)
        run.task = asyncio.ensure_future(self._attend(source, run, request))
        # Not in the task, which never begins if it is given up at once.
        run.task.add_done_callback(lambda _: self._ended(source, run))

    def _ended(self, source: _Source, run: _Run) -> None:
        source.runs.remove(run)
        if source.is_dropped:
            _stop(source.runs)
        self._changed.set()

    async def _attend(self, source: _Source, run: _Run, request: BlobRequest) -> None:
        """One request, to its end; the task boundary of what a source does to us."""
        try:
            await self._converse(source, run, request)
        except Offline:
            self._pause(source, MAX_FAULTS_PER_SOURCE)  # and again: nobody else would do better
        except (PeerFault, Unreachable) as error:
            self._faults.count(error, source.peer)
            self._known.failed(source.peer, self._now())
            source.num_faults += 1
            self._pause(source, source.num_faults)
            source.is_dropped = (
                isinstance(error, BadBlob) or source.num_faults >= MAX_FAULTS_PER_SOURCE
            )
        except ValueError as error:  # its name is no peer's, so it will never be a source
            self._faults.count(
                Unreachable(f"peer {source.peer} cannot be asked: {error}"), source.peer
            )
            source.is_dropped = True
        except Exception as error:  # of ours, such as a full disk: it ends the download
            self._failure = error

    def _pause(self, source: _Source, times: int) -> None:
        seconds = min(PAUSE_SECONDS * 2.0 ** (times - 1), MAX_PAUSE_SECONDS)
        source.ready_time = self._now() + seconds

    async def _converse(self, source: _Source, run: _Run, request: BlobRequest) -> None:
        frames = self._transport.stream(
            source.peer,
            BLOB_PROTOCOL,
            request.to_bytes(),
            timeout_seconds=self._known.frame_seconds(source.peer),
            max_frame_bytes=CHUNK_BYTES if request.num_chunks else MAX_INDEX_BYTES,
        )
        async with aclosing(frames):
            first = await anext(frames, None)
            if first is None or (request.num_chunks and not first):
                source.num_empty += 1
                self._pause(source, source.num_empty)
                return
            if request.num_chunks:
                await self._take_chunks(source, run, granted(request, first, source.peer), frames)
            elif self._part is None:
                self._open(checked_index(first, self._digest, source.peer, self._max_bytes))
            if await anext(frames, None) is not None:
                raise BadBlob(source.peer, f"sent more than was asked of {self._digest[:12]}")

    async def _take_chunks(
        self, source: _Source, run: _Run, chunks: list[int], frames: AsyncGenerator[bytes, None]
    ) -> None:
        assert self._part is not None, "chunks are asked for once the index is here"
        begin = run.last_time = self._now()
        run.is_granted = True
        run.due = [chunk for chunk in chunks if chunk in self._part.missing]
        self._changed.set()
        num_bytes = 0
        try:
            for chunk in chunks:
                data = await anext(frames, None)
                if data is None:
                    raise BadBlob(source.peer, f"stopped early in {self._digest[:12]}")
                if not self._part.write(chunk, data):
                    raise BadBlob(source.peer, f"wrong bytes for {self._digest[:12]}")
                num_bytes += len(data)
                self._arrived(source, run, chunk)
        finally:
            if num_bytes:
                # Two runs of one source share its line: the second one begins with the first's end.
                seconds = self._now() - max(begin, source.last_end_time)
                self._known.brought(source.peer, num_bytes, seconds)
                source.last_end_time = self._now()

    def _arrived(self, source: _Source, run: _Run, chunk: int) -> None:
        source.num_faults = source.num_empty = 0
        self._last_chunk_time = run.last_time = self._now()
        self._stall_time = self._last_chunk_time + STALL_SECONDS
        for other in (r for s in self._sources.values() for r in s.runs):
            if chunk in other.due:
                other.due.remove(chunk)
                if other is not run and not other.due:
                    _stop([other])  # nothing of what it still sends is needed
        if len(run.due) <= 1:
            self._changed.set()


def _has_room(source: _Source) -> bool:
    """Whether it may be asked: it has nothing to do, or almost nothing and is known to be good."""
    return not source.runs or (
        source.last_end_time > 0.0
        and len(source.runs) == 1
        and source.runs[0].is_granted
        and len(source.runs[0].due) <= 1
    )


def granted(request: BlobRequest, bits: bytes, peer: str) -> list[int]:
    """The chunks that a source says it will send; `BadBlob` unless we asked for them."""
    chunks = chunks_of(bits[: WINDOW_CHUNKS // 8 + 1], request.first_chunk)
    if len(chunks) > request.num_chunks or not set(chunks) <= set(request.chunks):
        raise BadBlob(peer, f"grants what was not asked for of {request.digest[:12]}")
    return chunks


def checked_index(raw: bytes, digest: str, peer: str, max_bytes: int) -> BlobIndex:
    """The index of the blob `digest` of at most `max_bytes`; `BadBlob` if it is not that."""
    try:
        index = BlobIndex.from_bytes(raw, max_bytes=max_bytes)
    except ValueError as error:
        raise BadBlob(peer, f"not an index of at most {max_bytes} bytes") from error
    if index.digest != digest:
        raise BadBlob(peer, "the index of another blob")
    return index


def _disk_fault(error: OSError) -> LocalFault:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LocalFault(
            "the disk is full; nothing that was written is lost", hint="free some space"
        )
    return LocalFault(f"cannot write to the disk: {error.strerror or error}")


def _stop(runs: list[_Run]) -> list[asyncio.Task[None]]:
    """Leave these requests; the tasks that are about to end."""
    tasks = [run.task for run in runs if run.task is not None]
    for task in tasks:
        task.cancel()
    return tasks
