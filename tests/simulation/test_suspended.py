"""A laptop that sleeps for minutes, in the middle of everything, and wakes up."""

import asyncio
from pathlib import Path

from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import VirtualClockLoop, run_virtual

ROUND = 20.0  # virtual seconds
NUM_MISSED = 6  # rounds, two minutes


def test_who_was_suspended_for_minutes_heals_within_two_rounds(tmp_path: Path) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        config = little_config(num_rounds=100, blocking=False)
        async with lab(tmp_path, config) as place:
            bootstrap = await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(4)]
            sleeper, node = peers[1], bootstrap.keeper.node
            await place.until(
                lambda: any(e["slot"] >= 1 for e in sleeper.seen("committed")),
                within=4 * ROUND,
                what="a round that it is in the middle of",
            )
            loop.freeze(sleeper.name)
            before, logged = bootstrap.versions(), len(sleeper.events)
            await asyncio.sleep(NUM_MISSED * ROUND)
            assert len(sleeper.events) == logged, "it did sleep"
            missed = bootstrap.versions()
            assert all(missed[m] >= before[m] + NUM_MISSED - 1 for m in before), "others did not"

            loop.thaw(sleeper.name)
            woken_slot = node.slot
            await place.until(
                lambda: any(
                    sleeper.peer_id in e["contributors"] and e["trained_slot"] >= woken_slot
                    for e in bootstrap.seen("version")
                ),
                within=3 * ROUND,
                what="being counted again",
            )
            assert bootstrap.seen("version")[-1]["trained_slot"] <= woken_slot + 2
            # What it took up, whenever that was, is what all others took up.
            theirs = {e["certificate"] for e in bootstrap.seen("version")}
            ours = [e for e in sleeper.events[logged:] if e["event"] in ("version", "caught up")]
            assert ours
            assert {e["certificate"] for e in ours} <= theirs
            assert not sleeper.seen("fork")
            assert not sleeper.seen("diverged")

    run_virtual(scenario())
