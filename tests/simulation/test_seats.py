"""Who comes back holds what it has a seat in, though it may train something else now."""

from pathlib import Path

import pytest

from dipaco.topology import PathID
from tests.history_checker import check_logs
from tests.lab import lab, little_config
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
            await place.until(
                lambda: all(min(p.versions().values(), default=0) >= 2 for p in peers),
                within=8 * ROUND,
                what="two versions of everything",
            )
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
        for verdict in check_logs(tmp_path):
            assert not verdict.violations

    run_virtual(scenario())
