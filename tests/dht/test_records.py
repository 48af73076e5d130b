from __future__ import annotations

import json

import pytest

from dht.errors import BadRecord
from dht.identity import Identity
from dht.records import (
    MAX_RECORD_BYTES,
    Announcement,
    Head,
    ManifestPointer,
    Provider,
    Record,
    Scores,
    decode,
    encode,
)

ME, OTHER = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
DIGEST = "ab" * 32
NOW = 1_700_000_000.0
RECORDS: list[Record] = [
    Announcement(peer=ME.peer_id, run="run-1", path="0.1", round=3, valid_nll=2.5, inner_share=0.9),
    Announcement(peer=ME.peer_id, run="run-1", path="0", round=2**53 - 1, maddrs=("/ip4/1.2.3.4",)),
    Head(peer=ME.peer_id, run="run-1", module="1.0", version=7, state=DIGEST),
    Provider(peer=ME.peer_id, digest=DIGEST),
    ManifestPointer(peer=ME.peer_id, run="run-1", name="a run", version=2, manifest=DIGEST),
    Scores(peer=ME.peer_id, run="run-1", path="0.1", phase=0, blob=DIGEST),
]


def decode_own(raw: bytes, record: Record, *, expiration_time: float = NOW + 60) -> Record:
    return decode(raw, key=record.key, subkey=record.peer, expiration_time=expiration_time, now=NOW)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_a_record_survives_the_wire(record: Record) -> None:
    raw = encode(record, ME, NOW + 60)
    assert decode_own(raw, record) == record
    assert len(raw) < 1000


def test_the_payload_is_readable_json() -> None:
    raw = encode(RECORDS[3], ME, NOW + 60)
    assert json.loads(raw[64:]) == {
        "peer": ME.peer_id,
        "withdrawn": False,
        "kind": "provider",
        "digest": DIGEST,
    }


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_no_byte_can_be_changed(record: Record) -> None:
    raw = encode(record, ME, NOW + 60)
    for position in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[position] ^= 1
        with pytest.raises(BadRecord):
            decode_own(bytes(changed), record)


def test_it_cannot_be_prolonged_or_cut_short() -> None:
    raw = encode(RECORDS[0], ME, NOW + 60)
    for expiration_time in (NOW + 61, NOW + 59):
        with pytest.raises(BadRecord, match="signature"):
            decode_own(raw, RECORDS[0], expiration_time=expiration_time)


def test_it_cannot_lie_under_another_key_or_peer() -> None:
    raw = encode(RECORDS[0], ME, NOW + 60)
    with pytest.raises(BadRecord, match="lies under"):
        decode(raw, key="elsewhere", subkey=ME.peer_id, expiration_time=NOW + 60, now=NOW)
    with pytest.raises(BadRecord, match="another peer"):
        decode(raw, key=RECORDS[0].key, subkey=OTHER.peer_id, expiration_time=NOW + 60, now=NOW)


@pytest.mark.parametrize(
    ("expiration_time", "why"),
    [(NOW, "expired"), (NOW - 1, "expired"), (NOW + 700, "600 s"), (float("nan"), "600 s")],
)
def test_it_must_live_and_not_for_long(expiration_time: float, why: str) -> None:
    raw = encode(RECORDS[0], ME, expiration_time)
    with pytest.raises(BadRecord, match=why):
        decode_own(raw, RECORDS[0], expiration_time=expiration_time)


def test_nobody_signs_for_another_peer() -> None:
    with pytest.raises(ValueError, match="cannot sign"):
        encode(RECORDS[0], OTHER, NOW + 60)


def signed(payload: bytes, key: str) -> bytes:
    """A record as a peer would forge it: correctly signed, with any payload."""
    from dht.records import _message

    return ME.sign(_message(key, ME.peer_id, NOW + 60, payload)) + payload


@pytest.mark.parametrize(
    "change",
    [
        {"digest": DIGEST.upper()},
        {"digest": DIGEST + "a"},
        {"extra": 1},
        {"kind": "unknown"},
        {"kind": ["provider"]},
        {"withdrawn": "yes"},
        {"peer": "x" * 52},
        {"peer": "12D3KooW" + "z" * 44},
    ],
    ids=str,
)
def test_a_payload_of_another_schema_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(RECORDS[3].model_dump_json())
    payload = json.dumps(fields | change).encode()
    with pytest.raises(BadRecord, match="malformed"):
        decode_own(signed(payload, RECORDS[3].key), RECORDS[3])


@pytest.mark.parametrize("round_number", ["-1", "1.5", "1e400", "NaN", "9007199254740992", '"1"'])
def test_numbers_are_bounded(round_number: str) -> None:
    payload = RECORDS[0].model_dump_json().replace('"round":3', f'"round":{round_number}')
    with pytest.raises(BadRecord, match="malformed"):
        decode_own(signed(payload.encode(), RECORDS[0].key), RECORDS[0])


def test_a_large_record_is_refused_before_it_is_parsed() -> None:
    payload = RECORDS[3].model_dump_json().encode() + b" " * MAX_RECORD_BYTES
    with pytest.raises(BadRecord, match="bytes"):
        decode_own(signed(payload, RECORDS[3].key), RECORDS[3])
