"""Blobs on the wire: what is asked, and how it is answered.

One request asks for a blob's index, or for some of the chunks that the asker still lacks. The
server says which of them it grants, then sends those, a frame each. So a peer that has only a part
serves that part, one that has nothing says so at once, which is no fault, and who is asked by many
sends each of them something else first: they get the rest from one another. The index is checked
against the blob's name, every chunk against the index, so a wrong byte costs the peer that sent it,
and at most one chunk of traffic.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from typing import Annotated
from weakref import WeakValueDictionary

from pydantic import Field

from dht.records import Digest
from peer.messages import Message
from peer.store import BlobStore
from peer.transport import Transport

BLOB_PROTOCOL = "/dipaco/blob/2"

MAX_CHUNKS_PER_REQUEST = 8
WINDOW_CHUNKS = 512  # that one request can speak of
MAX_BLOBS_COUNTED = 64  # whose chunks' sendings are remembered


class BlobRequest(Message):
    """Asks for the index (`num_chunks` 0), or for up to `num_chunks` of the wanted chunks.

    Bit i of `wanted` (see `chunk_bits`) stands for chunk `first_chunk` + i.
    """

    digest: Digest
    first_chunk: Annotated[int, Field(ge=0, le=2**26)] = 0
    num_chunks: Annotated[int, Field(ge=0, le=MAX_CHUNKS_PER_REQUEST)] = 0
    wanted: Annotated[str, Field(pattern=rf"^([0-9a-f]{{2}}){{0,{WINDOW_CHUNKS // 8}}}$")] = ""

    @property
    def chunks(self) -> list[int]:
        """The wanted chunks, ascending."""
        return chunks_of(bytes.fromhex(self.wanted), self.first_chunk)


def chunk_bits(chunks: Collection[int], first_chunk: int) -> bytes:
    """A set of chunks as bits, least significant first, of those from `first_chunk` on."""
    number = sum(1 << (chunk - first_chunk) for chunk in chunks)
    return number.to_bytes(-(-number.bit_length() // 8), "little")


def chunks_of(bits: bytes, first_chunk: int) -> list[int]:
    """The inverse of `chunk_bits`, ascending."""
    number = int.from_bytes(bits, "little")
    return [first_chunk + i for i in range(number.bit_length()) if number >> i & 1]


class BlobServer:
    """Answers for the blobs of one store, complete or on their way here."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        # One chunk at a time to each peer, so that a connection that is cut costs only that one.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._num_sent: OrderedDict[str, dict[int, int]] = OrderedDict()  # times, by blob and chunk

    async def serve(self, transport: Transport) -> None:
        """Start answering."""
        await transport.serve(BLOB_PROTOCOL, self._answer, max_request_bytes=512)

    async def _answer(self, peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        request = BlobRequest.from_bytes(payload, sender=peer_id)
        index = self._store.index(request.digest)
        if index is None:
            return
        if request.num_chunks == 0:
            yield index.to_bytes()
            return
        granted = self._grant(request)
        yield chunk_bits(granted, request.first_chunk)
        turn = self._turns.setdefault(peer_id, asyncio.Lock())
        for chunk in granted:
            async with turn:
                data = self._store.read_chunk(request.digest, chunk)
                if data is None:
                    raise ValueError("that chunk is gone")
                yield data

    def _grant(self, request: BlobRequest) -> list[int]:
        """Of the wanted chunks that are here, those that were sent least; ascending."""
        here = self._store.chunks(request.digest)
        num_sent = self._num_sent.pop(request.digest, {})
        self._num_sent[request.digest] = num_sent
        if len(self._num_sent) > MAX_BLOBS_COUNTED:
            self._num_sent.popitem(last=False)
        wanted = [chunk for chunk in request.chunks if chunk in here]
        wanted.sort(key=lambda chunk: num_sent.get(chunk, 0))
        granted = sorted(wanted[: request.num_chunks])
        for chunk in granted:
            num_sent[chunk] = num_sent.get(chunk, 0) + 1
        return granted
