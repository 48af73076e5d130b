import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.digest import (
    CHUNK_BYTES,
    BlobIndex,
    blob_digest,
    chunk_digest,
    index_of,
    index_of_file,
)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_index_of_memory_and_of_a_file_agree_and_round_trip(size: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    index = index_of(data)
    (tmp_path / "blob").write_bytes(data)
    assert index_of_file(tmp_path / "blob") == index
    assert BlobIndex.from_bytes(index.to_bytes(), max_bytes=size) == index
    with pytest.raises(ValueError, match="larger than"):
        BlobIndex.from_bytes(index.to_bytes(), max_bytes=size - 1)


def test_the_format_is_the_documented_one() -> None:
    of_chunk = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert chunk_digest(b"abc").hex() == of_chunk
    raw = b"dipaco-blob/2" + (3).to_bytes(8, "big") + bytes.fromhex(of_chunk)
    assert blob_digest(b"abc") == hashlib.sha256(raw).hexdigest()


@given(st.binary(max_size=80), st.booleans())
def test_garbage_is_a_value_error(raw: bytes, with_magic: bool) -> None:
    raw = b"dipaco-blob/2" + raw if with_magic else raw
    try:
        index = BlobIndex.from_bytes(raw, max_bytes=10 * CHUNK_BYTES)
    except ValueError:
        return
    assert index.to_bytes() == raw
