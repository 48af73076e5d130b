"""Bytes from strangers in place of a record: a named fault of theirs, and nothing else."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dht.errors import BadRecord
from dht.identity import Identity
from dht.records import MAX_RECORD_BYTES, Announcement, _message, decode, encode
from dht.swarm import readable
from dht.validation import check

ATTACKER = Identity(b"\x09" * 32)
NOW = 1_700_000_000.0
GENUINE = Announcement(peer=ATTACKER.peer_id, run="run", path="0.1", round=1)
RAW = encode(GENUINE, ATTACKER, NOW + 60)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
fields = json.loads(GENUINE.model_dump_json())
times = st.floats(allow_nan=True, allow_infinity=True)


def refused(
    raw: bytes, *, subkey: str = ATTACKER.peer_id, expiration_time: float = NOW + 60
) -> bool:
    try:
        decode(raw, key=GENUINE.key, subkey=subkey, expiration_time=expiration_time, now=NOW)
    except BadRecord as fault:
        return fault.peer_id == subkey and len(str(fault)) < 1000
    return False


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=MAX_RECORD_BYTES + 10), st.text(max_size=60), times)
@example(b"", "", 0.0)
def test_any_bytes(raw: bytes, subkey: str, expiration_time: float) -> None:
    assert refused(raw, subkey=subkey, expiration_time=expiration_time)
    assert readable({subkey: (raw, expiration_time)}, key="k", reader="r", now=NOW) == []


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*fields, "new"]), json_values)
def test_any_json_correctly_signed(field: str, value: object) -> None:
    payload = json.dumps(fields | {field: value}).encode()[: MAX_RECORD_BYTES - 64]
    message = _message(GENUINE.key, ATTACKER.peer_id, NOW + 60, payload)
    raw = ATTACKER.sign(message) + payload
    if not refused(raw):
        record = decode(
            raw, key=GENUINE.key, subkey=ATTACKER.peer_id, expiration_time=NOW + 60, now=NOW
        )
        assert len(record.model_dump_json()) < MAX_RECORD_BYTES


def test_deep_nesting_is_not_followed() -> None:
    for payload in (b"[" * 4000, b'{"kind":' * 500, b'{"a":[' * 600):
        message = _message(GENUINE.key, ATTACKER.peer_id, NOW + 60, payload)
        assert refused(ATTACKER.sign(message) + payload)


def test_a_genuine_record_is_not_refused() -> None:
    assert not refused(RAW)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20), st.binary(max_size=64), st.binary(max_size=200), times)
@example(b"", b"\xd9\x34" + b"\xff" * 52, b"", NOW)
@example(b"", b"\xd9\x34" + b"1" * 52, b"\xdd\xff\xff\xff\xff", NOW)
@example(b"", b"\xd9\x34" + b"1" * 52, b"\x91" * 200, NOW)
@example(b"", b"\xd9\x34" + b"1" * 52, b"\xc7\x01\x50\x00", NOW)
def test_the_validator_never_raises(
    key_bytes: bytes, subkey_bytes: bytes, value_bytes: bytes, expiration_time: float
) -> None:
    assert not check(
        key_bytes=key_bytes,
        subkey_bytes=subkey_bytes,
        value_bytes=value_bytes,
        expiration_time=expiration_time,
        now=NOW,
    )
