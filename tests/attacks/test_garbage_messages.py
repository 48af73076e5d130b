"""Garbage at every stream protocol of a peer: a named fault, no crash, and the peer goes on."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.errors import BadMessage, PeerFault
from peer.blob_server import BLOB_PROTOCOL, BlobRequest
from peer.chain_server import CHAIN_PROTOCOL
from peer.courier import ROUND_PROTOCOL, Courier, Kind
from peer.dial_back import DialBackReply, DialBackRequest
from peer.faults import Faults
from peer.hello import HELLO_PROTOCOL, say_hello
from peer.manifest import Manifest
from peer.messages import (
    CertifyRequest,
    ChainReply,
    ChainRequest,
    CommitRequest,
    HandoverReply,
    HandoverRequest,
    HaveReply,
    HaveRequest,
    HelloReply,
    HelloRequest,
    Message,
    ProposeReply,
    ProposeRequest,
    Seat,
)
from tests.lab import lab
from tests.little_run import identity, little_config
from tests.virtual_clock import run_virtual

TYPES: list[type[Message]] = [
    BlobRequest,
    CertifyRequest,
    ChainReply,
    ChainRequest,
    CommitRequest,
    DialBackReply,
    DialBackRequest,
    HandoverReply,
    HandoverRequest,
    HaveReply,
    HaveRequest,
    HelloReply,
    HelloRequest,
    Manifest,
    ProposeReply,
    ProposeRequest,
]
PROTOCOLS = [
    BLOB_PROTOCOL,
    CHAIN_PROTOCOL,
    HELLO_PROTOCOL,
    ROUND_PROTOCOL,
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", TYPES)
@given(raw=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_bytes_are_a_message_or_a_fault_of_their_sender(kind: type[Message], raw: bytes) -> None:
    with contextlib.suppress(BadMessage):
        kind.from_bytes(raw, sender="somebody")


@pytest.mark.parametrize("name", ["1" * 40, "12D3KooW" + "z" * 44, "12D3KooW" + "1" * 43, ""])
def test_a_name_that_no_peer_can_have_is_refused(name: str) -> None:
    """Else whoever is to ask everyone whom a certificate names would stumble over it for ever."""
    seat = Seat(peer=identity(1).peer_id, path=None)
    raw = seat.to_bytes()
    assert Seat.from_bytes(raw, sender="somebody") == seat
    with pytest.raises(BadMessage):
        Seat.from_bytes(raw.replace(seat.peer.encode(), name.encode()), sender="somebody")


@pytest.mark.parametrize("kind", TYPES)
def test_deep_or_large_input_is_refused(kind: type[Message]) -> None:
    for raw in (b"[" * 100_000, b'{"a":' * 50_000, b"0" * 300_000):
        with pytest.raises(BadMessage):
            kind.from_bytes(raw, sender="somebody")


def test_a_peer_outlives_garbage_at_every_protocol(tmp_path: Path) -> None:
    garbage = random.Random(0)

    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            victim = await place.bootstrap()
            attacker = place.network.transport(identity(99).peer_id)
            payloads = [b"", b"{}", b"null", b"\xff" * 400, garbage.randbytes(400), b'{"run":1}']
            for protocol in PROTOCOLS:
                for payload in payloads:
                    try:
                        await attacker.request(
                            victim.peer_id,
                            protocol,
                            payload,
                            timeout_seconds=5,
                            max_response_bytes=1000,
                        )
                    except PeerFault:
                        continue
                    pytest.fail(f"{protocol} accepted {payload!r}")
            courier = Courier(attacker, Faults(victim.keeper.node.events))
            for kind in Kind:
                for payload in payloads:
                    with pytest.raises(PeerFault):
                        await courier.ask(victim.peer_id, kind, payload, timeout_seconds=5)
            assert (await say_hello(attacker, victim.peer_id)).run == place.run.digest
            counted = victim.keeper.node.faults.by_peer[attacker.peer_id]
            assert counted["BadMessage"] >= 5 * len(payloads)
            assert not victim.seen("error")
            await attacker.close()

    run_virtual(scenario())
