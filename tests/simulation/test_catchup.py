"""A peer that was cut off catches up by what it missed if that is little, else by whole states."""

from pathlib import Path

import pytest

from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 10.0  # virtual seconds


@pytest.mark.parametrize(("num_missed", "way"), [(2, "replayed"), (6, "caught up")])
def test_missed_versions_are_replayed_while_their_contributions_are_there(
    tmp_path: Path, num_missed: int, way: str
) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, round_seconds=ROUND, wire_format="int8")
        async with lab(tmp_path, config) as place:
            keeper = await place.bootstrap()
            others = [await place.join(f"peer{n}") for n in range(4)]
            await place.until_versions(1, [keeper], within=40)
            before = keeper.versions()
            cut = len(keeper.events)
            place.network.partition({keeper.peer_id}, {peer.peer_id for peer in others})
            await place.until(
                lambda: all(
                    version >= before[module] + num_missed
                    for peer in others
                    for module, version in peer.versions().items()
                ),
                within=(num_missed + 4) * ROUND,
                what="versions without the keeper",
            )
            assert keeper.versions() == before
            assert place.network.faults["partition"]
            missed = {m: v for peer in others for m, v in peer.versions().items()}
            place.network.heal()
            await place.until(
                lambda: all(version >= missed[m] for m, version in keeper.versions().items()),
                within=4 * ROUND,
                what="the keeper's return",
            )
            # All four contributed to the module that all share: as many bytes as the state has.
            ways = {e["module"]: e["event"] for e in keeper.events[cut:]
                    if e["event"] in ("replayed", "caught up")}  # fmt: skip
            assert {ways[module] for module in before if module != "0.0"} == {way}

    run_virtual(scenario())
