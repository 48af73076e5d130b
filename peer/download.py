"""The download of one blob from several sources at once.

What is asked of whom is planned in `chunk_plan.py`; here it is asked, and what comes is written.
Chunks that came before a stream was cut stay. A source without anything for us is asked again a
little later.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random
from contextlib import aclosing
from typing import TYPE_CHECKING

from dht.errors import BadBlob, LocalFault, Offline, PeerFault, Unreachable
from dipaco.digest import CHUNK_BYTES, BlobIndex
from peer.blob_server import (
    BLOB_PROTOCOL,
    WINDOW_CHUNKS,
    BlobRequest,
    chunk_bits,
    chunks_of,
)
from peer.chunk_plan import (
    HEDGE_SECONDS,
    MAX_SOURCES,
    Run,
    Source,
    View,
    choose_chunks,
    has_room,
    is_nearly_done,
)
from peer.sources import doubled
from peer.store import MAX_INDEX_BYTES, BlobStore, PartialBlob

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from peer.faults import Faults
    from peer.sources import Sources
    from peer.transport import Transport

MAX_SOURCES_KNOWN = 64  # of one blob; more are not listened to
MAX_FAULTS_PER_SOURCE = 3  # without a chunk in between: then it is dropped for this blob
PAUSE_SECONDS = 0.25  # before one that failed, or had nothing, is asked again; doubled each time
MAX_PAUSE_SECONDS = 2.0
PATIENCE_SECONDS = 10.0  # with sources that all lack the rest, and nothing under way
STALL_SECONDS = 60.0  # without a chunk: the sources are none, however many there are


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
        self._sources: dict[str, Source] = {}
        self._tasks: dict[Run, asyncio.Task[None]] = {}
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
                self._sources[peer] = Source(peer)
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
            tasks = [task for s in self._sources.values() for task in self._stop(s.runs)]
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._part is not None:
                self._part.close()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _open(self, index: BlobIndex) -> None:
        """The index is here: chunks can be asked for, and nobody needs to bring it any more."""
        self._part = self._store.open_part(index)
        for source in self._sources.values():
            self._stop(r for r in source.runs if self._tasks[r] is not asyncio.current_task())

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
        view = self._view(alive, now)
        num_active = sum(bool(source.runs) for source in alive)
        look_seconds = min(PATIENCE_SECONDS, max(HEDGE_SECONDS, self._stall_time - now))
        for source in alive:
            if source.ready_time > now:
                look_seconds = min(look_seconds, source.ready_time - now)
            elif has_room(source) and (source.runs or num_active < MAX_SOURCES):
                request = self._request(source, view)
                if request is None:
                    look_seconds = min(look_seconds, HEDGE_SECONDS)
                else:
                    num_active += not source.runs
                    self._ask(source, request, now)
        return look_seconds

    def _view(self, alive: Sequence[Source], now: float) -> View:
        rates = {s.peer: self._known.bytes_per_second(s.peer) for s in alive}
        return View(
            sources=alive,
            missing=None if self._part is None else self._part.missing,
            rates={peer: rate for peer, rate in rates.items() if rate is not None},
            now=now,
        )

    def _request(self, source: Source, view: View) -> BlobRequest | None:
        """What to ask `source` for; None if nothing now."""
        if not source.runs and is_nearly_done(view):
            return None
        if view.missing is None:
            return None if source.runs else BlobRequest(digest=self._digest)
        choice = choose_chunks(source, view, self._random)
        if choice is None:
            return None
        first = choice.chunks[0]
        return BlobRequest(
            digest=self._digest,
            first_chunk=first,
            num_chunks=choice.num_chunks,
            wanted=chunk_bits(choice.chunks, first).hex(),
        )

    def _alive(self, now: float) -> list[Source]:
        """Sources that may be asked, the best first."""
        alive = [s for s in self._sources.values() if not s.is_dropped]
        good = [s for s in alive if s.runs or not self._known.is_skipped(s.peer, now)]
        if any(s.runs or not s.num_empty for s in good):
            alive = good
        ranked = self._known.ranked([s.peer for s in alive], now)
        return [self._sources[peer] for peer in ranked]

    def _check_hope(self, alive: list[Source], now: float) -> None:
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

    def _ask(self, source: Source, request: BlobRequest, now: float) -> None:
        run = Run(request.chunks, now)
        source.runs.append(run)
        task = self._tasks[run] = asyncio.ensure_future(self._attend(source, run, request))
        # Not in the task, which never begins if it is given up at once.
        task.add_done_callback(lambda _: self._ended(source, run))

    def _ended(self, source: Source, run: Run) -> None:
        source.runs.remove(run)
        del self._tasks[run]
        if source.is_dropped:
            self._stop(source.runs)
        self._changed.set()

    def _stop(self, runs: Iterable[Run]) -> list[asyncio.Task[None]]:
        """Leave these requests; the tasks that are about to end."""
        tasks = [self._tasks[run] for run in runs]
        for task in tasks:
            task.cancel()
        return tasks

    async def _attend(self, source: Source, run: Run, request: BlobRequest) -> None:
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

    def _pause(self, source: Source, times: int) -> None:
        source.ready_time = self._now() + doubled(PAUSE_SECONDS, times - 1, MAX_PAUSE_SECONDS)

    async def _converse(self, source: Source, run: Run, request: BlobRequest) -> None:
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
        self, source: Source, run: Run, chunks: list[int], frames: AsyncGenerator[bytes, None]
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

    def _arrived(self, source: Source, run: Run, chunk: int) -> None:
        source.num_faults = source.num_empty = 0
        self._last_chunk_time = run.last_time = self._now()
        self._stall_time = self._last_chunk_time + STALL_SECONDS
        for other in (r for s in self._sources.values() for r in s.runs):
            if chunk in other.due:
                other.due.remove(chunk)
                if other is not run and not other.due:
                    self._stop([other])  # nothing of what it still sends is needed
        if len(run.due) <= 1:
            self._changed.set()


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
