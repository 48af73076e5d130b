"""What every node checks before it stores a record for others or believes one it was sent.

hivemind shows a validator only hashes and packed bytes: the 20-byte SHA-1 of the packed key, the
packed subkey and the packed value. They are recomputed here from the record itself. An expired
record is *not* refused: storages drop it by themselves, and a reader must not discard a whole
answer because one entry expired on its way.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import msgpack

from dht.errors import BadRecord
from dht.identity import PEER_ID_CHARACTERS
from dht.records import MAX_RECORD_BYTES, is_lifetime_allowed, verified

_MAX_BIN_HEADER_BYTES = 3
_STR8_HEADER = bytes((0xD9, PEER_ID_CHARACTERS))  # msgpack's for a string of a peer ID's length


@lru_cache(maxsize=4096)
def key_id(key: str) -> bytes:
    """The 20-byte ID under which Kademlia keeps `key`."""
    return hashlib.sha1(msgpack.packb(key), usedforsecurity=False).digest()


def check(
    *, key_bytes: bytes, subkey_bytes: bytes, value_bytes: bytes, expiration_time: float, now: float
) -> bool:
    """Whether this is a record of ours: signed, in its place, and short-lived. Never raises."""
    if len(value_bytes) > MAX_RECORD_BYTES + _MAX_BIN_HEADER_BYTES:
        return False
    if not subkey_bytes.startswith(_STR8_HEADER) or not is_lifetime_allowed(expiration_time, now):
        return False
    try:
        subkey = subkey_bytes[len(_STR8_HEADER) :].decode("ascii")
        raw = msgpack.unpackb(value_bytes)
        if not isinstance(raw, bytes):
            return False
        record = verified(raw, subkey, expiration_time)
    except (BadRecord, ValueError, msgpack.UnpackException):
        return False
    return key_id(record.key) == key_bytes
