"""A peer whose clock is set an hour ahead for a while, and then right again."""

import asyncio
from pathlib import Path

import pytest

from dht.memory import MemorySwarm
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
HOUR = 3600.0


@pytest.mark.parametrize("seconds_ahead", [HOUR, -HOUR])
def test_who_had_a_wrong_clock_is_counted_again_within_two_rounds(
    seconds_ahead: float, tmp_path: Path
) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False)
        async with lab(tmp_path, config) as place:
            bootstrap = await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(4)]
            wrong, node = peers[0], bootstrap.keeper.node
            await place.until(
                lambda: any(e["slot"] >= 2 for e in wrong.seen("committed")),
                within=6 * ROUND,
                what="a round that it is in the middle of",
            )
            swarm = wrong.keeper.node.swarm
            assert isinstance(swarm, MemorySwarm)
            swarm.clock_skew_seconds = seconds_ahead
            await asyncio.sleep(1.5 * ROUND)
            if seconds_ahead > 0:
                slots = [e["slot"] for e in wrong.seen("training")]
                assert slots[-1] > node.slot + 100, "the fault: it is far ahead"
            swarm.clock_skew_seconds = 0.0
            right_slot = node.slot
            await place.until(
                lambda: any(
                    wrong.peer_id in e["contributors"] and e["trained_slot"] >= right_slot
                    for e in bootstrap.seen("version")
                ),
                within=3 * ROUND,
                what="being counted again",
            )
            assert wrong.seen("clock set back"), "whose clock went back, in the end or at first"

    run_virtual(scenario())
