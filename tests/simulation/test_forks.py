"""Who loses a fork goes on from the history that won, also if that is no longer than its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.modules import Held
from peer.path_work import PathWork, Rebasing
from tests.lab import LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
MODULE = ModuleID(0, 0)
CONFIG = replace(
    little_config(num_rounds=100, blocking=False, num_keepers=0),
    topology=TopologyConfig(levels=(1,)),
)


def held(peer: LabPeer) -> Held:
    return peer.keeper.node.log.held[MODULE]


def under_path(peer: LabPeer) -> int:
    """The version that a peer trains on."""
    assert peer.volunteer is not None
    return peer.volunteer.training.work.version(MODULE)


def test_the_loser_of_a_fork_is_counted_again_when_the_winner_is_gone(tmp_path: Path) -> None:
    """Nobody brings the history that won any further: it is as long as the loser's own."""

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=60.0) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(2)]
            await place.until(
                lambda: all(peer.seen("path") for peer in peers), within=50, what="a path each"
            )
            await place.leave("bootstrap")
            [left, right] = [{peer.peer_id} for peer in peers]
            place.network.partition(left, right)
            place.dht.partition(left, right)
            await place.until(
                lambda: all(under_path(p) == held(p).version >= 3 for p in peers),
                within=12 * ROUND,
                what="two histories, and each under a path",
            )
            assert len({held(peer).version for peer in peers}) == 1, "of equal length"
            assert len({held(peer).state for peer in peers}) == 2
            place.network.heal()
            place.dht.heal()
            for peer in peers:
                await peer.keeper.presence.publish_head(MODULE)
            [loser] = [peer for peer in peers if await peer.keeper.catch_up.refresh(MODULE)]
            [winner] = [peer for peer in peers if peer is not loser]
            assert [e["lost"] for e in loser.seen("fork") if e["module"] == str(MODULE)] == [True]
            before = under_path(loser)
            assert held(loser).version == before, "the winner has not gone on yet"
            await place.kill(winner.name)
            await place.until(
                lambda: held(loser).version >= before + 2,
                within=7 * ROUND,
                what="two more versions, which count what the loser trains",
            )

    run_virtual(scenario())


def test_what_was_prepared_for_a_version_that_is_not_held_is_not_put_under_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    rebase = PathWork.rebase

    def noting(work: PathWork, step: Rebasing) -> None:
        if step.module == MODULE:
            put.append(step.state)
        rebase(work, step)

    monkeypatch.setattr(PathWork, "rebase", noting)

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=3.0)
            await place.until(lambda: len(put) == 1, within=4 * ROUND, what="a version")
            assert peer.volunteer is not None
            rebaser, num_lost = peer.volunteer.training._rebaser, 0
            prepare = rebaser._prepare

            async def prepare_in_vain(module: ModuleID) -> Rebasing:
                """While this goes on, what it prepares for loses a fork."""
                nonlocal num_lost
                step = await prepare(module)
                if module == MODULE and not num_lost:
                    num_lost += 1
                    return replace(step, state="f" * 64)
                return step

            monkeypatch.setattr(rebaser, "_prepare", prepare_in_vain)
            await place.until(lambda: len(put) == 3, within=4 * ROUND, what="two more versions")
            assert num_lost
            assert put == [certificate.result for certificate in held(peer).chain]

    run_virtual(scenario())
