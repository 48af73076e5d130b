"""What a peer says of itself: again before it expires, but not what it said only just now."""

import asyncio
from pathlib import Path

import pytest

from dht.keys import announcement_key, head_key
from dht.records import Announcement, Head, Record
from dipaco.evaluate import Evaluation
from dipaco.topology import ModuleID, PathID
from peer.path_work import PathWork
from tests.lab import LabPeer, lab
from tests.little_run import little_config
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


async def announced(peer: LabPeer, path: PathID) -> Announcement:
    """What a peer says of the path that it trains; fails if that is nothing."""
    node = peer.keeper.node
    records = await node.swarm.read(announcement_key(node.run, str(path)))
    [own] = [r for r in records if isinstance(r, Announcement) and r.peer == node.peer_id]
    return own


def test_figures_of_one_path_are_not_announced_for_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=3.0)
            presence = peer.keeper.presence
            await place.until(
                lambda: presence.progress.valid_tokens > 0, within=100.0, what="an evaluation"
            )
            before = presence.path
            assert before is not None
            assert (await announced(peer, before)).valid_nll
            other = PathID((1 - before.experts[0], before.experts[1]))
            await presence.change_path(other)
            now = await announced(peer, other)
            assert (now.valid_nll, now.valid_tokens) == (None, 0)

    run_virtual(scenario())


def test_an_evaluation_that_ends_during_a_move_is_not_announced_for_the_next_path(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=3.0)
            presence, volunteer = peer.keeper.presence, peer.volunteer
            assert volunteer is not None
            await place.until(lambda: bool(peer.seen("round")), within=100.0, what="a round")
            training = volunteer.training
            other = PathID((1 - training.path.experts[0], training.path.experts[1]))
            await presence.change_path(other)  # a move begins so, and takes long
            await training._evaluate_round(training.work.round)
            await presence.announce()
            now = await announced(peer, other)
            assert now.commits, "what the evaluation has found out of the peer is said"
            assert (now.valid_nll, now.valid_tokens) == (None, 0)

    run_virtual(scenario())


def test_a_path_that_has_gone_wrong_is_announced_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its peer stays known, and leaves in good order."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=3.0)
            wrong = Evaluation(nll_sum=float("nan"), num_tokens=100)
            monkeypatch.setattr(PathWork, "evaluate", lambda work: (wrong, lambda: None))
            rounds = peer.seen("round")
            await place.until(
                lambda: len(peer.seen("round")) > len(rounds) + 2, within=200.0, what="evaluations"
            )
            path = peer.keeper.presence.path
            assert path is not None
            assert (await announced(peer, path)).valid_nll is None
            assert not peer.seen("error")

    run_virtual(scenario())
