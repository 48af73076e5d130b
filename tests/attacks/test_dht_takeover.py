"""What an attacker can do to a stock hivemind node, and cannot do to ours.

Each test first shows that the attack works on hivemind's own objects: when it stops doing so, the
part of `dht/hardening.py` that closes it can go.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from dht.hardening import HivemindStorage, harden, node_id_of
from dht.identity import Identity, peer_id_bytes
from dht.records import encode
from dht.storage import RecordStorage
from dht.swarm import MAX_SUBKEYS
from dht.validation import key_id
from tests.dht.swarm_contract import announcement
from tests.swarm.local import local_swarm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VICTIM, ATTACKER = (PeerID(peer_id_bytes(Identity(bytes([i]) * 32).peer_id)) for i in (1, 2))
KEY = DHTID.generate("key")


class FakeP2P:
    """Enough of a `P2P` to make a node's protocol."""

    peer_id = PeerID(peer_id_bytes(Identity(b"\x03" * 32).peer_id))

    async def add_protobuf_handler(self, *_: object, **__: object) -> None: ...


async def make_protocol(*, is_hardened: bool) -> DHTProtocol:
    protocol = await DHTProtocol.create(
        FakeP2P(), node_id_of(FakeP2P.peer_id), 20, 5, 5, wait_timeout=1.0
    )
    if is_hardened:
        harden(protocol, RecordStorage(get_dht_time))
    return protocol


def test_one_ping_cannot_take_over_a_routing_entry() -> None:
    async def holder(*, is_hardened: bool) -> PeerID:
        protocol = await make_protocol(is_hardened=is_hardened)
        await protocol.update_routing_table(node_id_of(VICTIM), VICTIM)
        await protocol.update_routing_table(node_id_of(VICTIM), ATTACKER)
        return protocol.routing_table[node_id_of(VICTIM)]

    assert asyncio.run(holder(is_hardened=False)) == ATTACKER, "closed upstream"
    assert asyncio.run(holder(is_hardened=True)) == VICTIM


def test_nobody_chooses_a_node_id_to_own_a_key() -> None:
    async def is_known(*, is_hardened: bool) -> bool:
        protocol = await make_protocol(is_hardened=is_hardened)
        await protocol.update_routing_table(KEY, ATTACKER)
        return KEY in protocol.routing_table

    assert asyncio.run(is_known(is_hardened=False)), "closed upstream"
    assert not asyncio.run(is_known(is_hardened=True))


def test_a_lie_about_neighbors_is_dropped() -> None:
    honest = node_id_of(VICTIM)
    lie = dht_pb2.FindResult(
        type=dht_pb2.NOT_FOUND,
        nearest_node_ids=[honest.to_bytes(), KEY.to_bytes()],
        nearest_peer_ids=[VICTIM.to_bytes(), ATTACKER.to_bytes()],
    )

    class Stub:
        async def rpc_find(self, *_: object, **__: object) -> dht_pb2.FindResponse:
            return dht_pb2.FindResponse(results=[lie])

    async def neighbors(*, is_hardened: bool) -> dict[DHTID, PeerID]:
        protocol = await make_protocol(is_hardened=is_hardened)
        protocol.get_stub = lambda _peer: Stub()
        found = await protocol.call_find(ATTACKER, [KEY])
        return found[KEY][1]

    assert KEY in asyncio.run(neighbors(is_hardened=False)), "closed upstream"
    assert asyncio.run(neighbors(is_hardened=True)) == {honest: VICTIM}


@pytest.mark.parametrize(
    ("make_storage", "survives"),
    [(DHTLocalStorage, False), (lambda: HivemindStorage(RecordStorage(time.time)), True)],
    ids=["hivemind's storage (else: closed upstream)", "ours"],
)
def test_a_refused_write_does_not_delete_the_record(
    make_storage: Callable[[], Any], survives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0])
    storage = make_storage()
    assert storage.store_subkey(KEY, "peer", b"live", clock[0] + 60)
    assert not storage.store_subkey(KEY, "peer", b"attack", clock[0] + 1)
    clock[0] += 2
    found = storage.get(KEY)
    is_alive = found is not None and dict(found.value.items()).get("peer") is not None
    assert is_alive == survives


def test_a_key_cannot_be_replaced_by_a_scalar_and_nothing_is_cached_for_others() -> None:
    async def main() -> None:
        protocol = await make_protocol(is_hardened=True)
        assert not protocol.storage.store(KEY, b"scalar", time.time() + 60)
        assert not protocol.cache.store(KEY, b"scalar", time.time() + 60)
        assert not protocol.cache.store_subkey(KEY, "peer", b"v", time.time() + 60)
        assert protocol.cache.get(KEY) is None
        assert KEY not in protocol.cache

    asyncio.run(main())


def test_a_huge_answer_is_dropped_before_it_is_verified() -> None:
    class Validator:
        num_calls = 0

        def validate(self, _record: object) -> bool:
            self.num_calls += 1
            return True

    async def main() -> None:
        protocol = await make_protocol(is_hardened=True)
        protocol.record_validator = Validator()
        crowd = DictionaryDHTValue()
        for i in range(MAX_SUBKEYS + 1):
            crowd.store(str(i), b"v", time.time() + 60)
        assert not protocol._validate_dictionary(KEY.to_bytes(), crowd)
        assert not protocol._validate_dictionary(KEY.to_bytes(), [1, 2, 3])
        assert protocol.record_validator.num_calls == 0

    asyncio.run(main())


@pytest.mark.swarm
def test_over_the_wire_a_node_takes_only_records_of_their_owners(tmp_path: Path) -> None:
    """A peer of the swarm turns attacker, and speaks to another one's DHT node directly."""

    async def main() -> None:
        async with local_swarm(tmp_path, 3) as [victim, attacker, reader]:
            record = announcement(victim.peer_id, 1)
            assert await victim.swarm.store(record, 60)
            target = PeerID.from_base58(reader.peer_id)
            protocol = attacker.swarm._node.protocol
            key = DHTID.from_bytes(key_id(record.key))
            soon, late = time.time() + 1, time.time() + 300
            forged = encode(announcement(attacker.peer_id, 9), attacker.identity, late)
            attempts: list[tuple[str | None, bytes, float]] = [
                (victim.peer_id, msgpack.packb(forged), late),
                (victim.peer_id, msgpack.packb(b"garbage"), late),
                (None, msgpack.packb(b"scalar"), late),
                ("someone", b"\xc1\xff", late),
                (attacker.peer_id, msgpack.packb(forged), soon),
            ]
            for subkey, value, expiration_time in attempts:
                answer = await protocol.call_store(
                    target, [key], [value], [expiration_time], [subkey]
                )
                assert answer == [False]
            crowd = DictionaryDHTValue()
            crowd.store(7, b"not a peer", late)
            assert not any(await protocol.call_store(target, [key], [crowd], [late]))
            assert await reader.swarm.read(record.key) == [record]

    asyncio.run(main())
