"""Blobs on disk: immutable, named by digest, checked again whenever they are read.

A blob lies in `<digest>`, its index in `<digest>.index`; an unfinished download in `<digest>.part`,
which survives a crash and is resumed. Nothing is ever visible under a digest that it does not have.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from dht.errors import LocalFault
from dipaco.checkpoint import link_or_copy
from dipaco.digest import CHUNK_BYTES, BlobIndex, chunk_digest, index_of, index_of_file

MAX_INDEX_BYTES = 8 * 2**20  # of one blob: 256 GiB of data


class BlobStore:
    """The blobs that one peer holds, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.limit_bytes: int | None = None  # of all files together; None is no limit
        self.on_full: Callable[[int], None] = lambda num_bytes: None  # may delete, to make room
        self._directory = directory
        self._indexes: dict[str, BlobIndex] = {}
        self._parts: dict[str, PartialBlob] = {}  # downloads under way, whose chunks are served
        self._written: set[str] = set()  # by this object, chunk by chunk verified or just hashed
        self._unwritten: dict[str, memoryview] = {}  # blobs that are on their way to the disk
        directory.mkdir(parents=True, exist_ok=True)

    def file(self, digest: str) -> Path:
        """Where the blob lies, or would lie."""
        return self._directory / digest

    def __contains__(self, digest: str) -> bool:
        is_here = digest in self._unwritten or self.file(digest).exists()
        return is_here and self.index(digest) is not None

    def digests(self) -> list[str]:
        """The digests of all complete blobs, sorted."""
        return sorted(f.name for f in self._directory.iterdir() if len(f.name) == 64)

    @property
    def used_bytes(self) -> int:
        """What all files take, with the rest of what is being downloaded."""
        parts = list(self._parts.values())
        coming = sum(min(len(part.missing) * CHUNK_BYTES, part.index.size) for part in parts)
        coming += sum(len(data) for data in list(self._unwritten.values()))
        with os.scandir(self._directory) as entries:
            return coming + sum(_allocated_bytes(entry) for entry in entries)

    def add(self, data: bytes) -> str:
        """Keep `data`; returns its digest. Idempotent. Raises `LocalFault` at the store's limit."""
        index = index_of(data)
        self.put(index, data)
        return index.digest

    def put(self, index: BlobIndex, data: bytes | memoryview) -> None:
        """Keep `data`, whose index the caller has computed already, as `add` does."""
        if index.digest not in self:
            self._require_room(index.size)
            self._write(self._index_file(index.digest), index.to_bytes())
            self._write(self.file(index.digest), data)
            self._indexes[index.digest] = index
            self._written.add(index.digest)

    def hold(self, index: BlobIndex, data: memoryview) -> None:
        """`put` at once, but only in memory until `flush`. Nobody may write into `data` any more.

        Raises `LocalFault` at the store's limit.
        """
        if index.digest not in self:
            self._require_room(index.size)
            self._indexes[index.digest] = index
            self._unwritten[index.digest] = data

    def flush(self, digest: str) -> None:
        """Write a blob that is held in memory to the disk, on any thread; OSError if that fails.

        Then it stays in memory, until it is removed.
        """
        index, data = self._indexes.get(digest), self._unwritten.get(digest)
        if index is None or data is None:
            return
        self._write(self._index_file(digest), index.to_bytes())
        self._write(self.file(digest), data)
        self._written.add(digest)
        if self._unwritten.pop(digest, None) is None:
            self.remove(digest)  # meanwhile it was

    def add_file(self, file: Path) -> str:
        """Keep a file's content without reading it into memory; the file must not change later."""
        index = index_of_file(file)
        if index.digest not in self:
            self._require_room(index.size)
            self._write(self._index_file(index.digest), index.to_bytes())
            temporary = self._directory / f".{index.digest}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            link_or_copy(file, temporary)
            temporary.replace(self.file(index.digest))
            self._indexes[index.digest] = index
        return index.digest

    def arrived_bytes(self, digest: str) -> int:
        """About how much of an unfinished download is on the disk."""
        try:
            return self._part_file(digest).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def age_seconds(self, digest: str) -> float:
        """For how long the blob has been here, even if its file is linked and older; else 0."""
        try:
            return time.time() - self.file(digest).stat().st_ctime
        except FileNotFoundError:
            return 0.0

    def index(self, digest: str) -> BlobIndex | None:
        """The index of a blob that is here (complete or in part), or None."""
        if digest not in self._indexes:
            try:
                raw = self._index_file(digest).read_bytes()
                index = BlobIndex.from_bytes(raw, max_bytes=2**45)
            except (FileNotFoundError, ValueError):
                return None
            if index.digest != digest:
                return None
            self._indexes[digest] = index
        return self._indexes[digest]

    def read(self, digest: str) -> bytes | None:
        """The whole blob, verified; None if it is absent. A blob that rotted on disk is deleted."""
        index = self.index(digest)
        if (held := self._unwritten.get(digest)) is not None:
            return bytes(held)
        try:
            data = self.file(digest).read_bytes()
        except FileNotFoundError:
            return None
        if index is None or index_of(data) != index:
            self.remove(digest)
            return None
        return data

    def intact_file(self, digest: str) -> Path | None:
        """Where the blob lies, verified without reading it into memory; None as `read`.

        What was written since the start is taken to be as it was written. One that is held in
        memory is not on disk yet.
        """
        index, file = self.index(digest), self.file(digest)
        if digest in self._written and file.exists():
            return file
        try:
            is_intact = index is not None and index_of_file(file) == index
        except FileNotFoundError:
            return None
        if not is_intact:
            self.remove(digest)
            return None
        return file

    def chunks(self, digest: str) -> Collection[int]:
        """The chunks that are here now, of a blob that is complete or being downloaded."""
        index = self.index(digest)
        if index is None:
            return ()
        all_chunks = range(len(index.chunk_digests))
        if digest in self:
            return all_chunks
        part = self._parts.get(digest)
        return () if part is None else set(all_chunks) - part.missing

    def read_chunk(self, digest: str, chunk: int) -> bytes | None:
        """One verified chunk; None if it is not here, there is no such chunk, or it has rotted."""
        index = self.index(digest)
        if index is None or not 0 <= chunk < len(index.chunk_digests):
            return None
        start = chunk * CHUNK_BYTES
        if (held := self._unwritten.get(digest)) is not None:
            return bytes(held[start : start + CHUNK_BYTES])
        try:
            with self.file(digest).open("rb") as file:
                file.seek(start)
                data = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            part = self._parts.get(digest)
            return None if part is None else part.read(chunk)
        if chunk_digest(data) != index.chunk_digests[chunk]:
            self.remove(digest)
            return None
        return data

    def remove(self, digest: str) -> None:
        """Forget a blob, whole or in part."""
        self._indexes.pop(digest, None)
        self._written.discard(digest)
        self._unwritten.pop(digest, None)
        for file in (self.file(digest), self._index_file(digest), self._part_file(digest)):
            file.unlink(missing_ok=True)

    def remove_leftovers(self, min_seconds: float) -> None:
        """Delete what nobody has written to for so long, and is no blob: downloads that were given
        up, and files that a killed process was writing.
        """
        with os.scandir(self._directory) as entries:
            files = [Path(entry.path) for entry in entries if entry.is_file()]
        for file in files:
            digest = file.name.partition(".")[0]
            is_leftover = not (digest and (digest in self._parts or digest in self))
            with contextlib.suppress(FileNotFoundError):
                if is_leftover and time.time() - file.stat().st_mtime > min_seconds:
                    file.unlink()
                    self._indexes.pop(digest, None)

    def open_part(self, index: BlobIndex) -> "PartialBlob":
        """Begin, or resume, a download. Raises `LocalFault` at the store's limit."""
        if not self._part_file(index.digest).exists():
            self._require_room(index.size)
        if self.index(index.digest) is None:
            self._write(self._index_file(index.digest), index.to_bytes())
            self._indexes[index.digest] = index
        part = PartialBlob(
            self._part_file(index.digest), self.file(index.digest), index, on_close=self._closed
        )
        self._parts[index.digest] = part
        return part

    def _closed(self, part: "PartialBlob") -> None:
        if self._parts.get(part.index.digest) is part:
            del self._parts[part.index.digest]
            if part.is_finished:
                self._written.add(part.index.digest)

    def _write(self, file: Path, data: bytes | memoryview) -> None:
        """Appear whole or not at all. Not flushed to the disk: what a power cut garbles here is
        found by its digest, and fetched again.
        """
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk is not to stay full of this
            raise

    def _require_room(self, num_bytes: int) -> None:
        """Raise `LocalFault` unless that much more may be stored, after deleting what can be."""
        if self.limit_bytes is None:
            return
        if (excess := self.used_bytes + num_bytes - self.limit_bytes) > 0:
            self.on_full(excess)
            if self.used_bytes + num_bytes > self.limit_bytes:
                raise LocalFault(
                    f"the disk limit is reached: {num_bytes / 1e9:.3f} GB more than the "
                    f"{self.limit_bytes / 1e9:.2f} GB for blobs would be needed",
                    hint="allow more with `--disk-limit SIZE`",
                )

    def _index_file(self, digest: str) -> Path:
        return self._directory / f"{digest}.index"

    def _part_file(self, digest: str) -> Path:
        return self._directory / f"{digest}.part"


def _allocated_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512  # a part has holes
    except FileNotFoundError:  # deleted meanwhile
        return 0


class PartialBlob:
    """A download in progress; chunks arrive in any order, each verified before it is written."""

    def __init__(
        self,
        part_file: Path,
        final_file: Path,
        index: BlobIndex,
        *,
        on_close: Callable[["PartialBlob"], None],
    ) -> None:
        self.index = index
        self._on_close = on_close
        self._part_file = part_file
        self._final_file = final_file
        self._fd = os.open(part_file, os.O_RDWR | os.O_CREAT, 0o644)
        self.is_finished = False
        self.missing = self._find_missing()

    def _find_missing(self) -> set[int]:
        """Chunks that an earlier attempt did not leave intact."""
        missing = set()
        for chunk, digest in enumerate(self.index.chunk_digests):
            data = os.pread(self._fd, CHUNK_BYTES, chunk * CHUNK_BYTES)
            if chunk_digest(data) != digest:
                missing.add(chunk)
        return missing

    def write(self, chunk: int, data: bytes) -> bool:
        """Keep a chunk if it is the right one; False if its digest differs."""
        if chunk_digest(data) != self.index.chunk_digests[chunk]:
            return False
        num_written = 0
        while num_written < len(data):  # a disk that is nearly full takes a part, then none
            num_written += os.pwrite(
                self._fd, memoryview(data)[num_written:], chunk * CHUNK_BYTES + num_written
            )
        self.missing.discard(chunk)
        return True

    def read(self, chunk: int) -> bytes | None:
        """A chunk that has arrived; None if it has not, or has rotted: then it is missing again."""
        if chunk in self.missing or self._fd < 0:
            return None
        data = os.pread(self._fd, CHUNK_BYTES, chunk * CHUNK_BYTES)
        if chunk_digest(data) != self.index.chunk_digests[chunk]:
            self.missing.add(chunk)
            return None
        return data

    def finish(self) -> None:
        """All chunks are here: make the blob visible under its digest."""
        assert not self.missing, "a blob is complete only when no chunk is missing"
        os.ftruncate(self._fd, self.index.size)
        self._part_file.rename(self._final_file)
        self.is_finished = True

    def close(self) -> None:
        """Release the file; the part stays for a later attempt. Idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
            self._on_close(self)
