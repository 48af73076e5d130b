"""Fetching blobs: what several callers want at the same time is downloaded once, for all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dht.errors import Unreachable
from peer.download import Download
from peer.sources import Sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer.faults import Faults
    from peer.store import BlobStore
    from peer.transport import Transport


class _Running:
    """A download under way, and how many wait for it."""

    def __init__(self, download: Download) -> None:
        self.download = download
        self.task = asyncio.ensure_future(download.run())
        self.num_waiting = 0


class BlobClient:
    """Fetches blobs into a store, each at most once at a time.

    `sources` is what all these fetches learn of other peers; it may be shared with other clients.
    """

    def __init__(
        self,
        store: BlobStore,
        transport: Transport,
        faults: Faults,
        *,
        sources: Sources | None = None,
    ) -> None:
        self.sources = sources or Sources()
        self._store = store
        self._transport = transport
        self._faults = faults
        self._running: dict[str, _Running] = {}

    async def fetch(
        self,
        digest: str,
        sources: Sequence[str],
        *,
        max_bytes: int,
        timeout_seconds: float | None = None,
    ) -> None:
        """Have the blob in the store when this returns.

        Up to `download.MAX_SOURCES` of `sources` are asked at once, better ones first, else in the
        order given; one that has only a part of the blob, or none yet, is welcome. Whoever asks for
        the same blob meanwhile shares the download, and adds its sources. Raises `Unreachable` if
        nothing comes any more (for `download.STALL_SECONDS`) or not everything within the time, if
        one is given; `LocalFault` if the disk does not take it. What arrived is kept for the next
        attempt.
        """
        if digest in self._store:
            return
        running = self._running.get(digest)
        if running is None:
            running = self._running[digest] = self._start(digest, max_bytes)
        running.download.allow(max_bytes)
        running.download.add(peer for peer in sources if peer != self._transport.peer_id)
        running.num_waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.shield(running.task)
        except TimeoutError:
            raise Unreachable(
                f"blob {digest[:12]} did not arrive in {timeout_seconds:.0f} s"
            ) from None
        finally:
            running.num_waiting -= 1
            if not running.num_waiting:
                self._forget(digest, running)

    async def close(self) -> None:
        """Give up whatever is running."""
        tasks = [running.task for running in self._running.values()]
        for digest, running in list(self._running.items()):
            self._forget(digest, running)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, digest: str, max_bytes: int) -> _Running:
        download = Download(
            digest,
            store=self._store,
            transport=self._transport,
            faults=self._faults,
            sources=self.sources,
            max_bytes=max_bytes,
        )
        return _Running(download)

    def _forget(self, digest: str, running: _Running) -> None:
        """Nobody waits any longer: end it, if it has not ended."""
        if self._running.get(digest) is running:
            del self._running[digest]
        running.task.cancel()
