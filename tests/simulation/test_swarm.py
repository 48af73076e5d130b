"""The whole swarm under a virtual clock: agreement, oracle parity, kills, late joiners."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.path_work import PathWork
from tests.lab import Lab, LabPeer, certified_states, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

PATHS = {"0.0", "0.1", "1.0", "1.1"}
ROUND = 20.0  # virtual seconds


async def four_peers(place: Lab) -> list[LabPeer]:
    return [await place.bootstrap(), *[await place.join(f"peer{n}") for n in range(4)]]


def finished(peers: list[LabPeer]) -> bool:
    return all(peer.seen("finished") for peer in peers if peer.volunteer is not None)


def oldest(peer: LabPeer) -> int:
    return min(peer.versions().values(), default=0)


def path_of(peer: LabPeer) -> str:
    return str(peer.seen("path")[-1]["path"])


def trained(peer: LabPeer) -> set[str]:
    return {entry["path"] for entry in peer.seen("contributed")}


def assert_agreement(peers: list[LabPeer]) -> None:
    """P1: whoever applied a version applied the same bytes."""
    assert all(len(states) == 1 for states in certified_states(peers).values())
    assert not any(peer.seen("diverged") or peer.seen("error") for peer in peers)


@pytest.mark.parametrize("wire_format", ["float32", "int8"])
def test_faultless_swarm_agrees_and_counts_everyone(tmp_path: Path, wire_format: str) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=3, wire_format=wire_format)
        async with lab(tmp_path, config) as place:
            everyone = await four_peers(place)
            await place.until(lambda: finished(everyone), within=200, what="the end")
            assert {path_of(peer) for peer in everyone[1:]} == PATHS
            assert {version for _, version in certified_states(everyone)} == {1, 2, 3}
            assert_agreement(everyone)
            for entry in everyone[0].seen("version"):
                assert len(entry["contributors"]) == (4 if entry["module"] == "0.0" else 2)

    run_virtual(scenario())


def test_training_goes_on_while_rounds_are_agreed(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=3, blocking=False)
        async with lab(tmp_path, config) as place:
            everyone = await four_peers(place)
            await place.until(lambda: finished(everyone), within=200, what="the end")
            assert_agreement(everyone)
            shares = [peer.seen("contributed")[-1]["tokens"] for peer in everyone[1:]]
            # One step takes 0.2 s here, so three slots hold about 300; rounds cost a few.
            assert min(shares) > 250 * 2 * 16

    run_virtual(scenario())


def test_the_same_certificate_from_two_peers_at_once_is_applied_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, round_seconds=10.0)) as place:
            everyone = await four_peers(place)
            bootstrap, others = everyone[0], {peer.peer_id for peer in everyone[1:]}
            await place.until(lambda: oldest(bootstrap) >= 1, within=40, what="a version")
            before = bootstrap.versions()["0.0"]
            place.network.partition({bootstrap.peer_id}, others)
            await place.until(
                lambda: everyone[1].versions()["0.0"] > before, within=40, what="a version without"
            )
            held = everyone[1].keeper.node.log.held[ModuleID(0, 0)]
            [certificate, *_] = held.after(before)
            place.network.heal()
            learn = bootstrap.keeper.member.learn
            senders = sorted(others)[:2]
            await asyncio.gather(*(learn(certificate, sender=sender) for sender in senders))
            assert bootstrap.versions()["0.0"] > before
            assert_agreement(everyone)

    run_virtual(scenario())


def test_a_killed_peer_costs_only_its_own_contribution(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=6)) as place:
            everyone = await four_peers(place)
            await place.until(
                lambda: all(oldest(peer) >= 2 for peer in everyone),
                within=100,
                what="two versions",
            )
            victim = everyone[2]
            killed_at_slot = victim.keeper.node.slot
            before = everyone[0].versions()
            await place.kill(victim.name)
            survivors = [peer for peer in everyone if peer is not victim]
            await place.until(
                lambda: all(v > before[m] for m, v in everyone[0].versions().items()),
                within=3 * ROUND,
                what="every module one version further after the kill",
            )
            for entry in everyone[0].seen("version"):
                if entry["version"] == before[entry["module"]] + 1:
                    assert entry["slot"] <= killed_at_slot + 1
            assert_agreement(survivors)

            back = await place.join(victim.name)
            slot = back.keeper.node.slot
            await place.until(
                lambda: bool(back.seen("contributed")), within=2 * ROUND, what="training again"
            )
            assert back.seen("contributed")[0]["slot"] <= slot + 1
            await place.until(
                lambda: (
                    back.peer_id in everyone[0].seen("version")[-1]["contributors"]
                    or finished(survivors)
                ),
                within=4 * ROUND,
                what="being counted again",
            )
            assert_agreement([*survivors, back])

    run_virtual(scenario())


def test_a_late_joiner_comes_in_through_a_volunteer_after_the_bootstrap_left(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=8)) as place:
            everyone = await four_peers(place)
            await place.until(lambda: oldest(everyone[1]) >= 2, within=100, what="two versions")
            await place.leave("bootstrap")
            late = await place.join("late", through="peer0")
            await place.until(
                lambda: bool(late.seen("contributed")), within=3 * ROUND, what="its contribution"
            )
            await place.until(
                lambda: any(late.peer_id in e["contributors"] for e in late.seen("version")),
                within=4 * ROUND,
                what="being counted",
            )
            assert_agreement([*everyone, late])

    run_virtual(scenario())


def test_fewer_peers_than_paths_take_turns(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=12)) as place:
            everyone = [
                await place.bootstrap(),
                await place.join("peer0"),
                await place.join("peer1"),
            ]
            await place.until(
                lambda: {path for p in everyone for path in trained(p)} == PATHS,
                within=12 * ROUND,
                what="every path trained by someone",
            )
            assert_agreement(everyone)

    run_virtual(scenario())


def test_who_finished_a_path_goes_on_with_one_that_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=2, blocking=False), topology=TopologyConfig(levels=(3,))
        )
        async with lab(tmp_path, config) as place:
            everyone = [await place.bootstrap()]
            everyone += [await place.join(f"peer{n}", step_seconds=4.0) for n in range(2)]
            await place.until(lambda: finished(everyone), within=6 * ROUND, what="the end")
            assert everyone[0].versions() == {"0.0": 2, "1.0": 2, "1.1": 2, "1.2": 2}
            assert_agreement(everyone)

    run_virtual(scenario())


def test_an_exact_run_ends_though_a_module_fell_behind(tmp_path: Path) -> None:
    """Its trainer is away for slots: the module that all share is finished long before it."""

    async def scenario() -> None:
        config = replace(little_config(num_rounds=5), topology=TopologyConfig(levels=(1, 2)))
        async with lab(tmp_path, config) as place:
            everyone = [await place.bootstrap()]
            everyone += [await place.join(f"peer{n}") for n in range(2)]
            await place.until_versions(1, everyone[:1], within=3 * ROUND)
            await place.kill(everyone.pop().name)
            await asyncio.sleep(5 * ROUND)
            ahead, behind = max(everyone[0].versions().values()), oldest(everyone[0])
            assert ahead >= behind + 2, "the fault: all of them waited"
            everyone.append(await place.join("peer1"))
            await place.until(lambda: finished(everyone), within=5 * ROUND, what="the end")
            assert set(everyone[0].versions().values()) == {5}
            assert_agreement(everyone)

    run_virtual(scenario())


def test_everyone_leaves_and_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=6)) as place:
            everyone = await four_peers(place)
            await place.until(lambda: oldest(everyone[1]) >= 2, within=100, what="two versions")
            for peer in everyone:
                await place.leave(peer.name)
            again = await four_peers(place)
            await place.until(
                lambda: bool(again[0].seen("version")), within=5 * ROUND, what="a new version"
            )
            assert again[0].seen("version")[0]["version"] >= 3
            assert_agreement(everyone + again)

    run_virtual(scenario())


def test_a_partition_from_the_start_heals_to_one_history(tmp_path: Path) -> None:
    """No quorum can prevent a fork before the first certificate; the fixed rule ends it."""

    async def scenario() -> None:
        config = little_config(num_rounds=60, round_seconds=10.0, blocking=False)
        async with lab(tmp_path, config, start_in=30.0) as place:
            everyone = await four_peers(place)
            await place.until(
                lambda: all(peer.seen("path") for peer in everyone[1:]), within=25, what="paths"
            )
            left = {peer.peer_id for peer in everyone[:3]}
            right = {peer.peer_id for peer in everyone[3:]}
            place.network.partition(left, right)
            place.dht.partition(left, right)
            await place.until(
                lambda: any(len(s) > 1 for s in certified_states(everyone).values()),
                within=8 * ROUND,
                what="two histories",
            )
            assert place.network.faults["partition"]
            place.network.heal()
            place.dht.heal()
            await place.until(
                lambda: any(peer.seen("fork") for peer in everyone), within=6 * ROUND, what="a fork"
            )
            healed = max(peer.versions()["0.0"] for peer in everyone)
            await place.until(
                lambda: all(peer.versions().get("0.0", 0) > healed + 1 for peer in everyone),
                within=12 * ROUND,
                what="two more versions on every side",
            )
            chains = [peer.keeper.node.log.held[ModuleID(0, 0)].chain for peer in everyone]
            assert len({chain[healed].digest for chain in chains}) == 1
            # What the rule decided is what everybody has now, and the losers said so.
            agreed = {made.digest for made in chains[0]}
            forks = [[e for e in p.seen("fork") if e["module"] == "0.0"] for p in everyone]
            assert any(fork["lost"] for seen in forks for fork in seen)
            for last in (seen[-1] for seen in forks if seen):
                assert last["theirs" if last["lost"] else "ours"] in agreed
                assert last["ours" if last["lost"] else "theirs"] not in agreed

    run_virtual(scenario())


@pytest.mark.parametrize("wire_format", ["float32", "int4"])
def test_in_a_crowded_round_some_merge_and_everyone_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire_format: str
) -> None:
    """Five peers on one path, of which a version has room for two: all of them are counted."""
    crowd(monkeypatch, max_counted=2)
    config = little_config(num_rounds=4, blocking=False, wire_format=wire_format)
    config = replace(config, topology=TopologyConfig(levels=(1,)))

    async def scenario() -> None:
        async with lab(tmp_path, config, start_in=15.0) as place:
            peers = [await place.bootstrap()]
            peers += [await place.join(f"peer{n}", step_seconds=2.0) for n in range(5)]
            await place.until(lambda: finished(peers), within=8 * ROUND, what="four rounds")
            chain = peers[0].keeper.node.log.held[ModuleID(0, 0)].chain
            everyone = {peer.peer_id for peer in peers[1:]}
            for made in chain:
                assert len(made.proposal.contributions) == 2
                assert set(made.proposal.contributors) == everyone
            slots = [made.proposal.slot for made in chain]
            trained = [
                [e["tokens"] for e in peer.seen("contributed") if e["slot"] == slots[-1]]
                for peer in peers[1:]
            ]
            assert sum(made.proposal.tokens for made in chain) == sum(map(sum, trained))
            assert all(len(states) == 1 for states in certified_states(peers).values())

    run_virtual(scenario())


@pytest.mark.parametrize("is_broken", [False, True])
def test_what_a_silent_peer_should_have_merged_the_next_rounds_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """Nobody merges: a version counts two of four, and nothing that was trained is lost."""
    crowd(monkeypatch, max_counted=2)
    silent = 0

    async def merge(*_: object) -> None:
        nonlocal silent
        silent += 1
        if is_broken:
            raise ValueError("no")

    monkeypatch.setattr("peer.merging.Merging._merge", merge)
    config = little_config(num_rounds=5, blocking=False)
    config = replace(config, topology=TopologyConfig(levels=(1,)))

    async def scenario() -> None:
        async with lab(tmp_path, config, start_in=15.0) as place:
            peers = [await place.bootstrap()]
            peers += [await place.join(f"peer{n}", step_seconds=2.0) for n in range(4)]
            await place.until(lambda: finished(peers), within=8 * ROUND, what="five rounds")
            chain = peers[0].keeper.node.log.held[ModuleID(0, 0)].chain
            counts = Counter(c.peer for made in chain for c in made.proposal.contributions)
            assert silent > 0
            errors = [entry["where"] for peer in peers for entry in peer.seen("error")]
            assert len(errors) == is_broken * silent
            assert set(errors) <= {"merging of 0.0", "merging of 1.0"}, "and not the whole round"
            assert all(len(made.proposal.contributions) <= 2 for made in chain)
            assert set(counts) == {peer.peer_id for peer in peers[1:]}
            waited = [c.tokens for c in chain[-1].proposal.contributions]
            assert min(waited) > min(c.tokens for c in chain[0].proposal.contributions)
            assert all(len(states) == 1 for states in certified_states(peers).values())

    run_virtual(scenario())


def crowd(monkeypatch: pytest.MonkeyPatch, *, max_counted: int) -> None:
    for module in ("attempt", "contributions", "merging"):
        monkeypatch.setattr(f"peer.{module}.MAX_COUNTED", max_counted)


def test_staggered_levels_contribute_one_after_another_and_all_advance(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=100, blocking=False, staggered=True)
        async with lab(tmp_path, config) as place:
            bootstrap = await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=1.5) for n in range(4)]
            await place.until(
                lambda: bootstrap.keeper.node.slot > 5, within=7 * ROUND, what="six slots"
            )
            first = place.run.manifest.start_time
            for level in range(3):
                shares = [
                    ((entry["time"] - first) / ROUND) % 1
                    for peer in peers
                    for entry in peer.seen("committed")
                    if entry["module"].startswith(f"{level}.") and entry["slot"] in range(1, 5)
                ]
                # Not more than a step before the end of the level's round, or shortly after it.
                ends = (level + 1) / 3 - 0.12, (level + 1) / 3 + 0.05
                assert len(shares) >= 4 * 4
                assert all(ends[0] <= share <= ends[1] or share + 1 <= ends[1] for share in shares)
            for module, version in bootstrap.versions().items():
                assert version >= 5, f"{module} did not advance in each slot"
            counted = [entry for entry in bootstrap.seen("version") if entry["slot"] in range(1, 5)]
            for entry in counted:
                assert len(entry["contributors"]) == (4 if entry["module"] == "0.0" else 2)
            assert_agreement([bootstrap, *peers])

    run_virtual(scenario())


def test_what_an_exact_run_saves_after_a_slot_knows_all_that_was_sent_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would send the residuals that are in it once more."""
    are_encoded: list[bool] = []
    save = PathWork.save

    def noting(work: PathWork) -> None:
        are_encoded.extend(bool(d.blob) for drafts in work._pending.values() for d in drafts)
        save(work)

    monkeypatch.setattr(PathWork, "save", noting)

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=2, wire_format="int4")) as place:
            everyone = [await place.bootstrap(), await place.join("peer")]
            await place.until_versions(1, everyone[1:], within=4 * ROUND)
            assert are_encoded
            assert all(are_encoded)

    run_virtual(scenario())


@pytest.mark.parametrize("num_peers", [8, 16, 20])
def test_a_large_group_agrees_and_goes_on_when_a_member_dies(
    tmp_path: Path, num_peers: int
) -> None:
    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=2, wire_format="int8"), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            everyone = [await place.bootstrap()]
            everyone += [await place.join(f"peer{n}") for n in range(num_peers)]
            await place.until(
                lambda: all(oldest(peer) >= 1 for peer in everyone), within=90, what="a version"
            )
            counted = everyone[0].seen("version")[0]["contributors"]
            assert len(counted) == num_peers
            await place.kill(everyone[-1].name)
            survivors = everyone[:-1]
            await place.until(lambda: finished(survivors), within=200, what="the end")
            assert_agreement(survivors)

    run_virtual(scenario())
