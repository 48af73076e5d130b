"""What a peer says of itself: again before it expires, but not what it said only just now."""

import asyncio
from pathlib import Path

import pytest

from dht.keys import head_key
from dht.records import Head, Record
from dipaco.topology import ModuleID
from tests.lab import lab, little_config
from tests.virtual_clock import run_virtual


def test_heads_are_renewed_in_time_and_not_said_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(), start_in=10_000.0) as place:
            keeper = (await place.bootstrap()).keeper
            modules = keeper.node.manifest.topology.modules
            assert await keeper.hold(modules)
            presence, swarm = keeper.presence, keeper.node.swarm
            said: list[str] = []
            store = swarm.store

            async def listening(record: Record, lifetime_seconds: float) -> bool:
                if isinstance(record, Head):
                    said.append(record.module)
                return await store(record, lifetime_seconds)

            monkeypatch.setattr(swarm, "store", listening)
            await presence.publish()
            said.clear()
            await presence.publish()
            assert not said
            module = ModuleID(1, 0)
            await presence.withdraw_head(module)
            said.clear()
            await presence.publish()
            assert said == [str(module)], "it was taken back"
            said.clear()
            await asyncio.sleep(3 * presence.lifetime_seconds)
            assert set(said) == {str(module) for module in modules}
            assert len(said) <= 3 * presence.lifetime_seconds / presence.renew_seconds * len(
                modules
            )
            for module in modules:
                records = await swarm.read(head_key(keeper.node.run, str(module)))
                assert records

    run_virtual(scenario())
