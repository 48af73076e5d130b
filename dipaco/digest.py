"""Names of blobs: SHA-256 over an index of chunk digests, which are BLAKE3.

A blob is cut into chunks of 1 MiB, so that it can be fetched from several peers at once and
verified chunk by chunk. Its index is

    b"dipaco-blob/2" + size (8 bytes, big-endian) + BLAKE3 of each chunk (32 bytes)

and its name is the SHA-256 of the index, as 64 hexadecimal digits. Who holds the name can
check the index, and who holds the index can check each chunk on its own.

Every member of a round hashes the whole new state of a module before it votes. Where the
processor has no instructions for SHA-256, that would take as long as all the rest of the round;
BLAKE3 is ten times faster there.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from blake3 import blake3

CHUNK_BYTES = 2**20
INDEX_MAGIC = b"dipaco-blob/2"
_SIZE_BYTES = 8
_DIGEST_BYTES = 32
_HEADER_BYTES = len(INDEX_MAGIC) + _SIZE_BYTES


@dataclass(frozen=True)
class BlobIndex:
    """The size of a blob in bytes and the digests of its chunks, in order."""

    size: int
    chunk_digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.size < 2**63:
            raise ValueError(f"blob size {self.size} is out of range")
        if len(self.chunk_digests) != num_chunks(self.size):
            raise ValueError(
                f"a blob of {self.size} bytes has {num_chunks(self.size)} chunks, "
                f"not {len(self.chunk_digests)}"
            )
        if any(len(digest) != _DIGEST_BYTES for digest in self.chunk_digests):
            raise ValueError(f"a chunk digest is {_DIGEST_BYTES} bytes long")

    @cached_property
    def digest(self) -> str:
        """The name of the blob: 64 hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The index as it travels."""
        size = self.size.to_bytes(_SIZE_BYTES, "big")
        return INDEX_MAGIC + size + b"".join(self.chunk_digests)

    @classmethod
    def from_bytes(cls, raw: bytes, *, max_bytes: int) -> "BlobIndex":
        """Read an index; ValueError if it is malformed or its blob is larger than `max_bytes`."""
        if len(raw) < _HEADER_BYTES or not raw.startswith(INDEX_MAGIC):
            raise ValueError("not a blob index")
        size = int.from_bytes(raw[len(INDEX_MAGIC) : _HEADER_BYTES], "big")
        if size > max_bytes:
            raise ValueError(f"blob of {size} bytes is larger than {max_bytes} bytes")
        if len(raw) != _HEADER_BYTES + num_chunks(size) * _DIGEST_BYTES:
            raise ValueError("length of a blob index does not fit its size")
        starts = range(_HEADER_BYTES, len(raw), _DIGEST_BYTES)
        return cls(size, tuple(raw[start : start + _DIGEST_BYTES] for start in starts))


def num_chunks(size: int) -> int:
    """Number of chunks of a blob of `size` bytes; an empty blob has none."""
    return -(-size // CHUNK_BYTES)


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """BLAKE3 of one chunk, 32 bytes."""
    return blake3(chunk).digest()


def index_of(data: bytes | memoryview) -> BlobIndex:
    """The index of a blob in memory."""
    view = memoryview(data).cast("B")
    chunks = (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))
    return BlobIndex(len(view), tuple(map(chunk_digest, chunks)))


def blob_digest(data: bytes | memoryview) -> str:
    """The name of a blob in memory."""
    return index_of(data).digest


def index_of_file(file: Path) -> BlobIndex:
    """The index of a file, read chunk by chunk; OSError if it cannot be read."""
    size = 0
    digests = []
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            digests.append(chunk_digest(chunk))
    return BlobIndex(size, tuple(digests))
