from __future__ import annotations

import msgpack
import pytest

from dht.identity import Identity
from dht.records import Provider, encode
from dht.validation import check, key_id

ME = Identity(b"\x01" * 32)
NOW = 1_700_000_000.0
RECORD = Provider(peer=ME.peer_id, digest="ab" * 32)
RAW = encode(RECORD, ME, NOW + 60)
GENUINE = {
    "key_bytes": key_id(RECORD.key),
    "subkey_bytes": msgpack.packb(ME.peer_id),
    "value_bytes": msgpack.packb(RAW),
    "expiration_time": NOW + 60,
}


def test_a_genuine_record_passes_even_when_it_has_expired() -> None:
    assert check(**GENUINE, now=NOW)
    assert check(**GENUINE, now=NOW + 61)


@pytest.mark.parametrize(
    "change",
    [
        {"key_bytes": key_id("elsewhere")},
        {"subkey_bytes": msgpack.packb(Identity(b"\x02" * 32).peer_id)},
        {"subkey_bytes": b""},
        {"subkey_bytes": msgpack.packb(None)},
        {"subkey_bytes": GENUINE["subkey_bytes"] + b"\0"},
        {"value_bytes": RAW},
        {"value_bytes": msgpack.packb(RAW) + b"\0"},
        {"value_bytes": msgpack.packb([RAW])},
        {"value_bytes": msgpack.packb(RAW + bytes(8192))},
        {"value_bytes": b"\x91" * 4000},
        {"expiration_time": NOW + 61},
        {"expiration_time": NOW + 1e9},
        {"expiration_time": float("inf")},
        {"expiration_time": float("nan")},
    ],
    ids=lambda change: str(change)[:40],
)
def test_anything_else_is_refused(change: dict[str, object]) -> None:
    assert not check(**(GENUINE | change), now=NOW)
