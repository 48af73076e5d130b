"""Nothing is visible under a digest that it does not have; downloads resume."""

import errno
import os
from pathlib import Path

import pytest

from dipaco.digest import CHUNK_BYTES, blob_digest, index_of
from peer.store import BlobStore

BLOB = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"tail"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def test_a_blob_comes_back_whole_and_by_chunk(store: BlobStore) -> None:
    digest = store.add(BLOB)
    assert digest == blob_digest(BLOB)
    assert store.read(digest) == BLOB
    assert store.read_chunk(digest, 2) == b"tail"
    assert store.read_chunk(digest, 3) is None


def test_a_file_is_kept_without_a_copy_in_memory(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "corpus"
    file.write_bytes(BLOB)
    assert store.read(store.add_file(file)) == BLOB


@pytest.mark.parametrize("reader", ["read", "read_chunk"])
def test_a_blob_that_rotted_on_disk_is_gone_rather_than_wrong(
    store: BlobStore, reader: str
) -> None:
    digest = store.add(BLOB)
    rotten = bytearray(BLOB)
    rotten[5] ^= 1
    store.file(digest).write_bytes(rotten)
    assert (store.read(digest) if reader == "read" else store.read_chunk(digest, 0)) is None
    assert digest not in store


def test_a_blob_in_memory_is_there_for_everyone_and_gets_to_the_disk(
    store: BlobStore, tmp_path: Path
) -> None:
    index = index_of(BLOB)
    store.hold(index, memoryview(BLOB))
    assert index.digest in store
    assert store.read(index.digest) == BLOB
    assert list(store.chunks(index.digest)) == [0, 1, 2]
    assert store.read_chunk(index.digest, 2) == b"tail"
    assert store.used_bytes == len(BLOB)
    assert index.digest not in BlobStore(tmp_path)
    store.flush(index.digest)
    assert BlobStore(tmp_path).read(index.digest) == BLOB
    store.flush(index.digest)  # nothing to do


def test_a_small_download_takes_no_more_than_it_will(store: BlobStore) -> None:
    part = store.open_part(index_of(b"small"))
    assert len(b"small") <= store.used_bytes < CHUNK_BYTES
    part.close()


def test_a_blob_that_is_removed_before_it_is_written_stays_away(
    store: BlobStore, tmp_path: Path
) -> None:
    index = index_of(BLOB)
    store.hold(index, memoryview(BLOB))
    store.remove(index.digest)
    store.flush(index.digest)
    assert index.digest not in store
    assert store.digests() == []


def test_a_download_resumes_with_what_was_intact(store: BlobStore, tmp_path: Path) -> None:
    index = index_of(BLOB)
    part = store.open_part(index)
    assert part.missing == {0, 1, 2}
    assert part.write(0, BLOB[:CHUNK_BYTES])
    assert not part.write(1, b"wrong")
    part.close()
    assert index.digest not in BlobStore(tmp_path)

    resumed = BlobStore(tmp_path).open_part(index)
    assert resumed.missing == {1, 2}
    assert resumed.write(1, BLOB[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert resumed.write(2, b"tail")
    resumed.finish()
    resumed.close()
    assert BlobStore(tmp_path).read(index.digest) == BLOB


def test_only_leftovers_are_swept(store: BlobStore, tmp_path: Path) -> None:
    """Downloads that were given up and half-written files, not blobs or what is under way."""
    kept = store.add(BLOB)
    store.hold(index_of(b"in memory"), memoryview(b"in memory"))
    given_up, under_way = index_of(BLOB[1:]), index_of(BLOB[2:])
    part = store.open_part(given_up)
    part.write(0, BLOB[1 : CHUNK_BYTES + 1])
    part.close()
    open_part = store.open_part(under_way)
    (tmp_path / f".{kept}.1.2").write_bytes(b"half of")
    store.remove_leftovers(3600.0)
    assert len(list(tmp_path.iterdir())) == 7, "nothing is that old"
    store.remove_leftovers(-1.0)
    names = {file.name for file in tmp_path.iterdir()}
    digest = under_way.digest
    assert names == {kept, f"{kept}.index", f"{digest}.part", f"{digest}.index"}
    assert open_part.write(0, BLOB[2 : CHUNK_BYTES + 2])


def test_a_chunk_that_the_disk_takes_in_part_is_not_taken_for_a_whole_one(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(BLOB)
    part = store.open_part(index)
    pwrite, room = os.pwrite, [CHUNK_BYTES // 2]

    def nearly_full(fd: int, data: bytes, offset: int) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[: room.pop()], offset)

    chunk = BLOB[:CHUNK_BYTES]
    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        part.write(0, chunk)
    assert 0 in part.missing
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    assert part.write(0, chunk)
    assert part.read(0) == chunk
    part.close()
