"""Blobs on the wire: serving them, and fetching them from several peers at once.

One request asks for a blob's index or for a run of chunks; the answer is a stream of frames of at
most one chunk. The index is checked against the blob's name, every chunk against the index, so a
wrong byte costs the peer that sent it, and at most one chunk of traffic.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from pydantic import Field

from dht.errors import BadBlob, PeerFault, Unreachable
from dipaco.digest import CHUNK_BYTES, BlobIndex
from peer.faults import Faults
from peer.messages import Digest, Message
from peer.store import MAX_INDEX_BYTES, BlobStore, PartialBlob
from peer.transport import Transport

BLOB_PROTOCOL = "/dipaco/blob/1"

MAX_SOURCES = 4  # peers asked at once for one blob
CHUNKS_PER_REQUEST = 8  # long enough to hide a round trip, short enough to share among sources
MAX_FAULTS_PER_SOURCE = 2  # then it is dropped for this blob; a wrong digest drops it at once
FRAME_TIMEOUT_SECONDS = 20.0  # for one chunk: 50 kB/s is the slowest useful source


class BlobRequest(Message):
    """Asks for the index (`num_chunks` 0) or for `num_chunks` chunks from `first_chunk` on."""

    digest: Digest
    first_chunk: Annotated[int, Field(ge=0, le=2**26)]
    num_chunks: Annotated[int, Field(ge=0, le=CHUNKS_PER_REQUEST)]


class BlobServer:
    """Answers for the blobs of one store."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def serve(self, transport: Transport) -> None:
        """Start answering."""
        await transport.serve(BLOB_PROTOCOL, self._answer, max_request_bytes=512)

    async def _answer(self, peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        request = BlobRequest.from_bytes(payload, sender=peer_id)
        index = self._store.index(request.digest)
        if index is None or request.digest not in self._store:
            raise ValueError("no such blob here")
        if request.num_chunks == 0:
            yield index.to_bytes()
        for chunk in range(request.first_chunk, request.first_chunk + request.num_chunks):
            data = self._store.read_chunk(request.digest, chunk)
            if data is None:
                raise ValueError("no such chunk here")
            yield data


class BlobClient:
    """Fetches blobs into a store, each at most once at a time."""

    def __init__(self, store: BlobStore, transport: Transport, faults: Faults) -> None:
        self._store = store
        self._transport = transport
        self._faults = faults
        self._running: dict[str, asyncio.Task[None]] = {}

    async def fetch(
        self, digest: str, sources: Sequence[str], *, max_bytes: int, timeout_seconds: float
    ) -> None:
        """Have the blob in the store when this returns.

        `sources` are tried in order, up to `MAX_SOURCES` at once. Raises `Unreachable` if they do
        not yield the blob within the time; what arrived is kept for the next attempt.
        """
        if digest in self._store:
            return
        task = self._running.get(digest)
        if task is None:
            fetching = self._fetch(digest, list(sources), max_bytes, timeout_seconds)
            task = self._running[digest] = asyncio.ensure_future(fetching)
            task.add_done_callback(lambda done: self._ended(digest, done))
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.shield(task)
        except TimeoutError:
            raise _too_late(digest, timeout_seconds) from None

    def _ended(self, digest: str, task: asyncio.Task[None]) -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it; nobody may be left

    async def close(self) -> None:
        """Give up whatever is running."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _fetch(
        self, digest: str, sources: list[str], max_bytes: int, timeout_seconds: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._fetch_from(digest, sources, max_bytes=max_bytes)
        except TimeoutError:
            raise _too_late(digest, timeout_seconds) from None

    async def _fetch_from(self, digest: str, sources: list[str], *, max_bytes: int) -> None:
        sources = [peer for peer in dict.fromkeys(sources) if peer != self._transport.peer_id]
        index = await self._fetch_index(digest, sources, max_bytes=max_bytes)
        part = self._store.open_part(index)
        try:
            await self._fetch_chunks(part, sources)
            part.finish()
        finally:
            part.close()

    async def _fetch_index(self, digest: str, sources: list[str], *, max_bytes: int) -> BlobIndex:
        known = self._store.index(digest)
        if known is not None:
            return known
        request = BlobRequest(digest=digest, first_chunk=0, num_chunks=0)
        for peer in list(sources):
            try:
                raw = await self._transport.request(
                    peer,
                    BLOB_PROTOCOL,
                    request.to_bytes(),
                    timeout_seconds=FRAME_TIMEOUT_SECONDS,
                    max_response_bytes=MAX_INDEX_BYTES,
                )
                return _checked_index(raw, digest, peer, max_bytes)
            except (PeerFault, Unreachable) as error:
                self._faults.count(error, peer)
                sources.remove(peer)
        raise Unreachable(f"none of the peers asked has blob {digest[:12]}")

    async def _fetch_chunks(self, part: PartialBlob, sources: list[str]) -> None:
        """Share the missing chunks among the sources, fast ones taking more."""
        usable = list(sources)
        while part.missing and usable:
            todo = _runs(sorted(part.missing))
            async with asyncio.TaskGroup() as group:
                for peer in usable[:MAX_SOURCES]:
                    group.create_task(self._work(part, todo, peer, usable))
        if part.missing:
            raise Unreachable(
                f"{len(part.missing)} chunks of {part.index.digest[:12]} found nowhere"
            )

    async def _work(
        self, part: PartialBlob, todo: list[range], peer: str, usable: list[str]
    ) -> None:
        """Take runs of chunks from `todo` until none is left or the source has proven unusable.

        What it failed to bring is asked for again, of those that are left, when all are done.
        """
        num_faults = 0
        while todo:
            run = todo.pop(0)
            try:
                await self._fetch_run(part, run, peer)
            except (PeerFault, Unreachable) as error:
                self._faults.count(error, peer)
                num_faults += 1
                if isinstance(error, BadBlob) or num_faults >= MAX_FAULTS_PER_SOURCE:
                    usable.remove(peer)
                    return

    async def _fetch_run(self, part: PartialBlob, run: range, peer: str) -> None:
        request = BlobRequest(digest=part.index.digest, first_chunk=run.start, num_chunks=len(run))
        frames = self._transport.stream(
            peer,
            BLOB_PROTOCOL,
            request.to_bytes(),
            timeout_seconds=FRAME_TIMEOUT_SECONDS,
            max_frame_bytes=CHUNK_BYTES,
        )
        chunk = run.start
        async for data in frames:
            if chunk >= run.stop or not part.write(chunk, data):
                raise BadBlob(peer, f"wrong bytes for {part.index.digest[:12]}")
            chunk += 1
        if chunk != run.stop:
            raise BadBlob(peer, f"stopped early in {part.index.digest[:12]}")


def _too_late(digest: str, seconds: float) -> Unreachable:
    return Unreachable(f"blob {digest[:12]} did not arrive in {seconds:.0f} s")


def _checked_index(raw: bytes, digest: str, peer: str, max_bytes: int) -> BlobIndex:
    try:
        index = BlobIndex.from_bytes(raw, max_bytes=max_bytes)
    except ValueError as error:
        raise BadBlob(peer, f"not an index of at most {max_bytes} bytes") from error
    if index.digest != digest:
        raise BadBlob(peer, "the index of another blob")
    return index


def _runs(chunks: list[int]) -> list[range]:
    """Cut sorted chunk numbers into consecutive runs of at most `CHUNKS_PER_REQUEST`."""
    runs: list[range] = []
    for chunk in chunks:
        last = runs[-1] if runs else None
        if last is not None and last.stop == chunk and len(last) < CHUNKS_PER_REQUEST:
            runs[-1] = range(last.start, chunk + 1)
        else:
            runs.append(range(chunk, chunk + 1))
    return runs
