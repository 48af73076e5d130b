"""Who comes back holds what it has a seat in, though it may train something else now."""

import asyncio
from pathlib import Path

import pytest

from dipaco.topology import PathID
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds


def test_a_restarted_peer_votes_where_it_has_a_seat_and_trains_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, and back on another path in the same round: it votes for the modules of both."""

    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False, num_keepers=0)
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            for number in range(4):
                await place.join(f"peer{number}", step_seconds=2.0)
            peers = list(place.peers.values())[1:]
            await place.until_versions(2, peers, within=8 * ROUND)
            victim = peers[0]
            assert victim.volunteer is not None
            path = PathID.parse(victim.seen("path")[-1]["path"])
            seated = {str(m) for m in place.run.manifest.topology.modules_of(path)}
            await place.kill(victim.name)
            other = PathID((1 - path.experts[0], path.experts[1]))
            monkeypatch.setattr("peer.volunteer.joining_order", lambda *_: [other])
            again = await place.join(victim.name, step_seconds=2.0)
            assert {entry["module"] for entry in again.seen("resumed")} == seated
            await place.until(lambda: bool(again.seen("path")), within=ROUND, what="a path")
            assert again.seen("path")[-1]["path"] == str(other)
            slot = again.keeper.node.slot
            await place.until(
                lambda: {e["module"] for e in again.seen("voted") if e["slot"] == slot} >= seated,
                within=2 * ROUND,
                what="its votes in the slot in which it came back",
            )

    run_virtual(scenario())


def test_a_duty_is_given_up_after_slots_however_long_they_are(tmp_path: Path) -> None:
    """Newcomers take the duties of all who had them, in slots longer than the looks at who is
    there: the old members vote until the new ones have their seats, so that no version is missed.
    """
    round_seconds = 60.0

    async def scenario() -> None:
        config = little_config(
            num_rounds=100, blocking=False, round_seconds=round_seconds, num_keepers=2
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            for number in range(4):
                await place.join(f"peer{number}", step_seconds=round_seconds / 4)
            first = list(place.peers.values())[1:]
            await place.until_versions(1, first, within=6 * round_seconds)
            await place.leave("bootstrap")
            node = first[0].keeper.node
            begin = node.history.first.slot_start(node.slot + 3)
            await asyncio.sleep(begin - node.now() + 0.4 * round_seconds)
            slot = node.slot
            for number in range(8):
                await place.join(f"new{number}", through="peer0", step_seconds=round_seconds / 4)
            await asyncio.sleep(4 * round_seconds)
            dropped = [entry for peer in first for entry in peer.seen("dropped")]
            assert dropped, "nobody gave a duty up"
            assert all(entry["time"] > begin + 2 * round_seconds for entry in dropped)
            for module in place.run.manifest.topology.modules:
                slots = {
                    entry["slot"]
                    for peer in place.peers.values()
                    for entry in peer.seen("version")
                    if entry["module"] == str(module)
                }
                assert {slot, slot + 1, slot + 2, slot + 3} <= slots

    run_virtual(scenario())


def test_two_who_open_a_module_do_not_take_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one began before the first had ended, and waits longer for the origin's state."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            boot = await place.bootstrap()
            await place.join("peer0", step_seconds=2.0)
            module = place.run.manifest.topology.modules[0]
            await place.until_versions(2, [boot], within=8 * ROUND)
            node, catch_up = boot.keeper.node, boot.keeper.catch_up
            waits = iter((0.0, ROUND))

            async def obtain(ref: object) -> None:
                await asyncio.sleep(next(waits))

            async def nobody(*_: object) -> bool:
                return False

            node.log.drop(module)
            node.events.write("dropped", module=str(module))
            with monkeypatch.context() as patch:  # nothing newer is to be had, at first
                patch.setattr(node.log, "open", lambda module: None)
                patch.setattr(catch_up, "_follow", nobody)
                patch.setattr(catch_up._providers, "obtain", obtain)
                second = asyncio.ensure_future(
                    asyncio.wait_for(asyncio.gather(*map(catch_up.open, [module] * 2)), 2 * ROUND)
                )
                await asyncio.sleep(0.5)
            versions = []
            for _ in range(60):
                versions.append(node.log.held[module].version)
                await asyncio.sleep(ROUND / 30)
            assert await second == [True, True]
            assert versions == sorted(versions)
            assert versions[-1] >= 3

    run_virtual(scenario())
