from __future__ import annotations

import asyncio

from dht.errors import BadRecord
from dht.identity import Identity
from dht.memory import EPOCH_TIME, MemoryDHT, MemorySwarm
from dht.records import Announcement
from dht.swarm import MAX_SUBKEYS, readable
from tests.dht.swarm_contract import announcement, check_closed_swarm, check_swarm
from tests.virtual_clock import run_virtual


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def test_keeps_the_promises_of_a_swarm() -> None:
    async def main() -> None:
        dht = MemoryDHT(latency_seconds=0.1)
        swarms = [MemorySwarm(dht, identity(i)) for i in range(1, 5)]
        await check_swarm(swarms)
        await check_closed_swarm(swarms[0])

    run_virtual(main())


def test_records_expire_on_the_clock_of_the_loop() -> None:
    async def main() -> None:
        swarm = MemorySwarm(MemoryDHT(), identity(1))
        record = announcement(swarm.peer_id, 1)
        assert await swarm.store(record, 60)
        await asyncio.sleep(59)
        assert await swarm.read(record.key) == [record]
        await asyncio.sleep(1)
        assert await swarm.read(record.key) == []
        assert swarm.now() == EPOCH_TIME + 60

    run_virtual(main())


def test_a_partition_hides_the_other_side_until_it_heals() -> None:
    async def main() -> None:
        dht = MemoryDHT()
        swarms = [MemorySwarm(dht, identity(i)) for i in range(1, 4)]
        for swarm in swarms:
            await swarm.store(announcement(swarm.peer_id, 1), 60)
        key = announcement(swarms[0].peer_id, 1).key
        dht.partition([swarms[0].peer_id], [swarm.peer_id for swarm in swarms[1:]])
        assert [len(await swarm.read(key)) for swarm in swarms] == [1, 2, 2]
        dht.heal()
        assert [len(await swarm.read(key)) for swarm in swarms] == [3, 3, 3]

    run_virtual(main())


def test_a_peer_whose_clock_is_off_does_not_get_through() -> None:
    async def main() -> None:
        dht = MemoryDHT()
        late = MemorySwarm(dht, identity(1), clock_skew_seconds=-100)
        assert not await late.store(announcement(late.peer_id, 1), 60)
        assert late.now() == EPOCH_TIME - 100

    run_virtual(main())


def test_a_crowd_under_one_key_is_sampled_differently_by_each_reader() -> None:
    now = 0.0
    crowd = [identity(i) for i in range(1, MAX_SUBKEYS + 50)]
    from dht.records import encode

    entries = {
        peer.peer_id: (encode(announcement(peer.peer_id, 1), peer, 60.0), 60.0) for peer in crowd
    }
    key = announcement(crowd[0].peer_id, 1).key
    samples = [readable(entries, key=key, reader=reader, now=now) for reader in ("a", "b")]
    assert [len(sample) for sample in samples] == [MAX_SUBKEYS, MAX_SUBKEYS]
    assert samples[0] != samples[1]
    assert samples[0] == sorted(samples[0], key=lambda record: record.peer)


def test_a_bad_record_hides_nobody_else() -> None:
    from dht.records import encode

    good, bad = identity(1), identity(2)
    record = announcement(good.peer_id, 1)
    entries = {
        good.peer_id: (encode(record, good, 60.0), 60.0),
        bad.peer_id: (b"garbage", 60.0),
        "x": (b"", float("nan")),
    }
    assert readable(entries, key=record.key, reader="a", now=0.0) == [record]


def test_hundreds_of_peers_share_one_process() -> None:
    async def one(swarm: MemorySwarm) -> int:
        for round_number in range(5):
            record = Announcement(run="run", path="0", peer=swarm.peer_id, round=round_number)
            await swarm.store(record, 120)
            await asyncio.sleep(60)
        return len(await swarm.read(record.key))

    async def main() -> None:
        dht = MemoryDHT(latency_seconds=0.05)
        swarms = [MemorySwarm(dht, identity(i)) for i in range(1, 101)]
        assert await asyncio.gather(*map(one, swarms)) == [100] * 100

    run_virtual(main())


def test_faults_of_others_are_named() -> None:
    fault = BadRecord("12D3KooW", "why")
    assert (fault.peer_id, fault.why, str(fault)) == ("12D3KooW", "why", "peer 12D3KooW: why")
