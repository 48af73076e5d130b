"""Garbage at every stream protocol of a peer: a named fault, no crash, and the peer goes on."""

from __future__ import annotations

import contextlib
import json
import random
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peer
from dht.errors import BadMessage, PeerFault
from peer.blob_server import BlobRequest
from peer.courier import Courier, Kind
from peer.dial_back import DialBack, DialBackReply, DialBackRequest
from peer.faults import Faults
from peer.hello import say_hello
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
from tests.peer.dialling import FakeSwarm
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


def every_protocol() -> set[str]:
    """Those that any module of `peer` defines."""
    modules = [import_module(f"peer.{module.name}") for module in iter_modules(peer.__path__)]
    values = (value for module in modules for value in vars(module).values())
    return {value for value in values if isinstance(value, str) and value.startswith("/dipaco/")}


def test_a_peer_outlives_garbage_at_every_protocol(tmp_path: Path) -> None:
    garbage = random.Random(0)

    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            await place.bootstrap()
            victim = await place.join("victim")
            await place.until(lambda: bool(victim.seen("path")), within=60.0, what="a path")
            attacker = place.network.transport(identity(99).peer_id)
            swarm = FakeSwarm(attacker.peer_id, [], [])
            dial_back = DialBack(swarm, victim.keeper.node.transport, is_relay=False)  # type: ignore[arg-type]
            await dial_back.serve()  # as every peer does, before it has a run
            payloads = [b"", b"{}", b"null", b"\xff" * 400, garbage.randbytes(400), b'{"run":1}']
            for protocol in sorted(every_protocol()):
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
