"""Path choice in a running swarm: turns, slow peers, joiners at one instant."""

import asyncio
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dht.errors import Unreachable
from dipaco.checkpoint import ModuleState
from dipaco.config import TopologyConfig
from dipaco.inner import PathTrainer
from dipaco.topology import ModuleID, PathID
from peer.assignment import Snapshot
from peer.keeper import RETIRE_SLOTS
from tests.lab import Lab, LabPeer, certified_states, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
STEP_SECONDS = 3.0


def assert_agreement(peers: list[LabPeer]) -> None:
    """P1: whoever applied a version applied the same bytes."""
    assert all(len(states) == 1 for states in certified_states(peers).values())
    assert not any(peer.seen("diverged") or peer.seen("error") for peer in peers)


def counted_tokens(bootstrap: LabPeer, *, before: int) -> Counter[str]:
    """Tokens by path that certificates count, of slots before `before`."""
    counts: Counter[str] = Counter()
    log = bootstrap.keeper.node.log
    [shared] = [module for module in log.held if module.level == 0]
    for certificate in log.held[shared].chain:
        for commitment in certificate.proposal.contributions:
            if commitment.slot < before:
                counts[commitment.path] += commitment.tokens
    return counts


def worst_share(place: Lab, counts: Counter[str]) -> float:
    """How far the tokens of any path are from its shard's share, relative to that."""
    shards = {str(p): tokens for p, tokens in place.run.manifest.shard_tokens.items()}
    total, all_shards = sum(counts.values()), sum(shards.values())
    return max(abs(counts[p] * all_shards / (total * shard) - 1) for p, shard in shards.items())


def test_three_peers_give_each_of_four_paths_its_share_of_tokens(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False)
        async with lab(tmp_path, config) as place:
            bootstrap = await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=STEP_SECONDS) for n in range(3)]
            await place.until(
                lambda: bootstrap.keeper.node.slot > 20, within=23 * ROUND, what="20 slots"
            )
            counts = counted_tokens(bootstrap, before=20)
            assert worst_share(place, counts) <= 0.1
            assert_agreement([bootstrap, *peers])
            # Whoever takes a path goes on in its shard where the one before has got to.
            for numbers in place.batches.values():
                distinct = len(set(numbers))
                assert distinct >= 0.95 * len(numbers) > 50, numbers
                assert max(numbers) < 1.1 * distinct, numbers

    run_virtual(scenario())


def test_a_peer_ten_times_slower_takes_part_and_harms_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False)
        async with lab(tmp_path, config) as place:
            bootstrap = await place.bootstrap()
            fast = [await place.join(f"fast{n}", step_seconds=0.7) for n in range(3)]
            slow = await place.join("slow", step_seconds=8.8)
            await place.until(
                lambda: bootstrap.keeper.node.slot > 6, within=10 * ROUND, what="six slots"
            )
            assert_agreement([bootstrap, *fast, slow])
            for module, version in bootstrap.versions().items():
                assert version >= 6, f"{module} did not advance in each of the six slots"
            chains = {m.level: h.chain for m, h in bootstrap.keeper.node.log.held.items()}
            tokens: dict[str, list[int]] = {peer.peer_id: [] for peer in [*fast, slow]}
            for certificate in chains[0]:
                for commitment in certificate.proposal.contributions:
                    tokens[commitment.peer].append(commitment.tokens)
            assert all(len(counted) >= 6 for counted in tokens.values()), "each counts in each slot"
            least = min(sum(tokens[peer.peer_id][1:6]) for peer in fast)
            assert 0 < sum(tokens[slow.peer_id][1:6]) <= least / 5

    run_virtual(scenario())


def test_joiners_at_the_same_instant_settle_within_one_round(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False)
        async with lab(tmp_path, config) as place:
            there = [
                await place.bootstrap(),
                await place.join("old0", step_seconds=STEP_SECONDS),
                await place.join("old1", step_seconds=STEP_SECONDS),
            ]
            await place.until(
                lambda: bool(there[0].seen("version")), within=3 * ROUND, what="a version"
            )
            joiners = await asyncio.gather(
                place.join("new0", step_seconds=STEP_SECONDS),
                place.join("new1", step_seconds=STEP_SECONDS),
            )
            await place.until(
                lambda: all(peer.seen("path") for peer in joiners), within=ROUND, what="a path each"
            )
            slot = there[0].keeper.node.slot
            await place.until(
                lambda: there[0].keeper.node.slot > slot + 1,
                within=3 * ROUND,
                what="two more slots",
            )
            peers = [*there[1:], *joiners]
            settled = {e["path"] for p in peers for e in p.seen("contributed")
                       if e["slot"] == slot + 1}  # fmt: skip
            assert len(settled) == len(peers)
            assert_agreement([*there, *joiners])

    run_virtual(scenario())


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_move_lets_a_trainer_go_before_it_makes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """A device may have no room for two; nor is there one left if the new path cannot begin."""
    config = replace(
        little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(2,))
    )

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=STEP_SECONDS)
            await place.until(lambda: bool(peer.seen("path")), within=ROUND, what="a path")
            assert peer.volunteer is not None
            source = peer.volunteer._source
            make, state = source._make_trainer, source.state
            first = weakref.ref(peer.volunteer.training.work.trainer)
            trainers, num_damaged = [first], 0

            def counting(*args: Any) -> PathTrainer:
                assert not any(trainer() for trainer in trainers)
                trainer = make(*args)
                trainers.append(weakref.ref(trainer))
                return trainer

            async def damaged_once(module: ModuleID) -> ModuleState:
                nonlocal num_damaged
                if is_damaged and len(trainers) == 2 and not num_damaged:
                    num_damaged += 1
                    raise Unreachable("damaged")
                return await state(module)

            monkeypatch.setattr(source, "_make_trainer", counting)
            monkeypatch.setattr(source, "state", damaged_once)
            await place.until(
                lambda: len(peer.seen("moved")) >= 2, within=10 * ROUND, what="two moves"
            )
            assert num_damaged == is_damaged
            assert len(trainers) == 3 + 2 * is_damaged
            await place.until_versions(2, [peer], within=6 * ROUND)

    run_virtual(scenario())


@pytest.mark.parametrize("is_former_gone", [False, True])
def test_a_move_that_fails_after_slots_leaves_the_former_path_or_takes_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_former_gone: bool
) -> None:
    config = replace(
        little_config(num_rounds=100, blocking=False, num_keepers=0),
        topology=TopologyConfig(levels=(2,)),
    )
    num_slots = RETIRE_SLOTS + 3

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=STEP_SECONDS) for n in range(3)]
            await place.until_versions(2, peers, within=6 * ROUND)
            mover = peers[0]
            keeper, volunteer = mover.keeper, mover.volunteer
            assert volunteer is not None
            former = volunteer.training.path
            other = PathID((1 - former.experts[0],))
            [own, wanted] = [ModuleID(1, path.experts[0]) for path in (former, other)]
            opened, has_failed = keeper.catch_up.open, False

            async def open_in_vain(module: ModuleID) -> bool:
                """Its holders leave in the middle of it, and do not come back for slots."""
                nonlocal has_failed
                if module != wanted or has_failed:
                    return await opened(module)
                await asyncio.sleep(num_slots * ROUND)
                has_failed = True
                if is_former_gone:
                    keeper.node.log.drop(own)
                    keeper.node.events.write("dropped", module=str(own))
                return False

            def choose(snapshot: Snapshot) -> None:
                volunteer._snapshot = snapshot
                volunteer._plan = {} if has_failed else {mover.peer_id: other}

            monkeypatch.setattr(keeper.catch_up, "open", open_in_vain)
            monkeypatch.setattr(volunteer, "_choose", choose)
            await place.until(
                lambda: has_failed, within=(num_slots + 3) * ROUND, what="a move that fails"
            )
            failed_time, num_paths = mover.events[-1]["time"], len(mover.seen("path"))
            await place.until(
                lambda: any(
                    mover.peer_id in e["contributors"] and e["trained_slot"] >= keeper.node.slot - 1
                    for e in mover.seen("version")
                    if e["time"] > failed_time
                ),
                within=4 * ROUND,
                what="being counted again",
            )
            assert [e["path"] for e in mover.seen("path not to be had")] == [str(other)]
            assert len(mover.seen("path")) == num_paths + is_former_gone
            if not is_former_gone:
                assert not mover.seen("dropped")
                assert keeper.presence.path == former

    run_virtual(scenario())
