"""A running swarm moves to the next manifest: everyone at the same slot, with the same bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootstrap.growth import request_growth, requested_growth
from dipaco.checkpoint import decode_state, state_digest
from dipaco.compression import decode
from dipaco.config import RoutingConfig, RunConfig, TopologyConfig
from dipaco.errors import ConfigError
from dipaco.outer import apply_contributions, contribution_weights
from dipaco.topology import ModuleID, PathID
from peer.display import describe
from peer.manifest import Manifest
from peer.messages import Certificate
from peer.path_work import PathWork
from peer.scoring import Scoring
from peer.succession import ManifestDraft
from tests.lab import Lab, LabPeer, certified_states, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 10.0  # virtual seconds
PATHS = {"0.0", "0.1", "1.0", "1.1"}
MANY = 1000  # rounds: none of these runs comes to its end


async def swarm(place: Lab, num_peers: int, *, step_seconds: float = 0.0) -> list[LabPeer]:
    bootstrap = await place.bootstrap()
    names = [f"peer{n}" for n in range(num_peers)]
    return [bootstrap, *[await place.join(name, step_seconds=step_seconds) for name in names]]


async def until_slot(place: Lab, slot: int) -> None:
    node = place.peers["bootstrap"].keeper.node
    await place.until(lambda: node.slot >= slot, within=ROUND * (slot + 2), what=f"slot {slot}")


def certificates(peer: LabPeer) -> list[Certificate]:
    return [c for held in peer.keeper.node.log.held.values() for c in held.chain]


def in_force(peer: LabPeer) -> dict[int, int]:
    """By version of the manifest: the slot in which this peer began to train by it."""
    return {entry["version"]: entry["slot"] for entry in peer.seen("manifest in force")}


def assert_agreement(peers: list[LabPeer]) -> None:
    """P1: whoever applied a version applied the same bytes."""
    assert all(len(states) == 1 for states in certified_states(peers).values())
    assert not any(peer.seen("diverged") or peer.seen("error") for peer in peers)


def recompute_versions(peer: LabPeer) -> list[tuple[int, bool]]:
    """For every version that `peer` applies: the manifest by which it must have been made, and
    whether that manifest's weights and settings do give the certified state.
    """
    node = peer.keeper.node
    outcomes: list[tuple[int, bool]] = []

    def recompute(entry: dict[str, Any]) -> None:
        if entry["event"] != "version":
            return
        held = node.log.held[ModuleID.parse(entry["module"])]
        proposal = held.chain[-1].proposal
        manifest = node.history.at(proposal.slot)
        size = node.log.num_parameters(held.module)
        outer = manifest.run_config.outer
        before = node.store.read(proposal.contributions[0].base_state)
        paths = [PathID.parse(c.path) for c in proposal.contributions]
        tokens = [c.tokens for c in proposal.contributions]
        gradients = [
            decode(node.store.read(c.blob) or b"", outer.wire_format, num_parameters=size)
            for c in proposal.contributions
        ]
        weights = contribution_weights(list(zip(paths, tokens, strict=True)), manifest.shard_tokens)
        after = apply_contributions(
            decode_state(before or b"", num_parameters=size),
            zip(weights, gradients, strict=True),
            len(paths),
            outer,
        )
        outcomes.append((manifest.version, state_digest(after.state) == entry["state"]))

    node.events.listen(recompute)
    return outcomes


@pytest.mark.parametrize("blocking", [True, False])
def test_new_shards_come_into_force_everywhere_in_one_slot(tmp_path: Path, blocking: bool) -> None:
    """Also where inner steps end a good while before their slot."""

    async def scenario() -> None:
        config = little_config(num_rounds=MANY, round_seconds=ROUND, blocking=blocking)
        async with lab(tmp_path, config) as place:
            everyone = await swarm(place, 4, step_seconds=0.0 if blocking else 3.0)
            bootstrap = everyone[0]
            outcomes = recompute_versions(bootstrap)
            await until_slot(place, 1)
            other = replace(config, outer=replace(config.outer, wire_format="float16"))
            manifest = await place.issue(other)
            assert manifest.first_slot == 4
            await until_slot(place, 5)
            for peer in everyone[1:]:
                assert in_force(peer) == {2: 4}
                path = PathID.parse(peer.seen("path")[-1]["path"])
                assert peer.seen("manifest in force")[0]["shard"] == (
                    manifest.shard(path).blob.digest
                )
            assert set(outcomes) == {(1, True), (2, True)}
            for certificate in certificates(bootstrap):
                slot = certificate.proposal.slot
                expected = manifest if slot >= 4 else place.run.manifest
                assert certificate.proposal.manifest == expected.digest
            assert_agreement(everyone)
            # Nobody missed a slot.
            slots = [entry["slot"] for entry in everyone[1].seen("contributed")]
            assert slots == list(range(len(slots)))
            assert {c.ballot.slot for c in certificates(bootstrap)} >= {2, 3, 4}

    run_virtual(scenario())


def test_who_was_away_and_who_knows_only_the_first_manifest_reach_the_newest(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=MANY, round_seconds=ROUND)
        async with lab(tmp_path, config) as place:
            everyone = await swarm(place, 4)
            await until_slot(place, 1)
            await place.kill("peer3")
            second = await place.issue(config)
            await until_slot(place, second.first_slot)
            third = await place.issue(config)
            await until_slot(place, third.first_slot)
            await place.leave("bootstrap")
            back = await place.join("peer3", through="peer0")
            late = await place.join("late", through="peer1")
            newcomers = [back, late]
            await place.until(
                lambda: all(
                    any(peer.peer_id in e["contributors"] for e in everyone[1].seen("version"))
                    for peer in newcomers
                ),
                within=4 * ROUND,
                what="being counted",
            )
            for peer in newcomers:
                assert peer.keeper.node.history.newest.digest == third.digest
                assert peer.seen("path")[0]["manifest"] == 3
            assert_agreement([*everyone[:4], back, late])

            await place.leave("late")
            again = await place.join("late", through="peer1")
            assert again.keeper.node.history.newest.digest == third.digest, "it is on disk"

    run_virtual(scenario())


def test_who_cannot_read_the_pointers_hears_of_a_manifest_from_commitments(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=MANY, round_seconds=ROUND)
        async with lab(tmp_path, config) as place:
            everyone = await swarm(place, 4)
            await until_slot(place, 1)
            deaf, *others = everyone[1:]
            place.dht.partition({deaf.peer_id}, {peer.peer_id for peer in [everyone[0], *others]})
            manifest = await place.issue(config)
            await until_slot(place, manifest.first_slot)
            assert deaf.keeper.node.history.newest == place.run.manifest
            await until_slot(place, manifest.first_slot + 2)
            assert deaf.keeper.node.history.newest == manifest
            # Alone as far as it can see, it changes its path all the time.
            assert deaf.seen("path")[-1]["manifest"] == 2
            await place.until(
                lambda: any(
                    deaf.peer_id in entry["contributors"]
                    for entry in everyone[0].seen("version")
                    if entry["slot"] > manifest.first_slot
                ),
                within=4 * ROUND,
                what="being counted again",
            )
            assert_agreement(everyone)

    run_virtual(scenario())


def test_one_path_grows_into_four(tmp_path: Path) -> None:
    """Though every inner step takes half a slot, so that some end long before it does."""

    async def scenario() -> None:
        config = little_config(num_rounds=MANY, round_seconds=6.0, blocking=False)
        config = replace(config, topology=TopologyConfig(levels=(1, 1)))
        async with lab(tmp_path, config) as place:
            everyone = await swarm(place, 4, step_seconds=3.0)
            await place.until_versions(1, [everyone[0]], within=3 * ROUND)
            assert {peer.seen("path")[-1]["path"] for peer in everyone[1:]} == {"0.0"}
            request_growth(place.directory, (2, 2))
            place.operate()
            bootstrap = everyone[0].keeper.node
            await place.until(
                lambda: len(bootstrap.history.versions) == 2, within=12.0, what="a new manifest"
            )
            manifest = bootstrap.history.newest
            born = {birth.module: birth for birth in manifest.births}
            assert {m: birth.source for m, birth in born.items()} == {"1.1": "1.0", "2.1": "2.0"}
            await until_slot(place, manifest.first_slot + 1)
            late = await place.join("late")
            everyone.append(late)
            await place.until(
                lambda: (
                    all(
                        len(held.chain) >= 2
                        for peer in everyone
                        for held in peer.keeper.node.log.held.values()
                    )
                    and bool(late.seen("contributed"))
                ),
                within=4 * ROUND,
                what="two versions of every module",
            )
            assert {peer.seen("path")[-1]["path"] for peer in everyone[1:5]} == PATHS
            assert_agreement(everyone)
            for module, birth in born.items():
                held = bootstrap.log.held[ModuleID.parse(module)]
                source = bootstrap.log.held[ModuleID.parse(birth.source)]
                assert source.after(birth.version - 1)[0].result == birth.state.digest
                assert held.chain[0].proposal.parent == birth.state.digest
                assert held.chain[0].version == birth.version + 1
                assert held.chain[0].proposal.slot >= manifest.first_slot
                # What existed goes on without a gap.
                assert [c.version for c in source.chain] == list(range(1, source.version + 1))

    run_virtual(scenario())


def test_growth_that_is_asked_for_meanwhile_is_what_the_run_gets(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = little_config(num_rounds=MANY, round_seconds=6.0, blocking=False)
        config = replace(config, topology=TopologyConfig(levels=(1, 1)))
        async with lab(tmp_path, config) as place:
            bootstrap = (await place.bootstrap()).keeper.node
            request_growth(place.directory, (1, 2))
            corpus = place.operate()
            grow, asked = corpus.grow, []

            def slow_grow(manifest: Manifest, config: RunConfig) -> ManifestDraft:
                asked.append(config.topology.levels)
                request_growth(place.directory, (2, 2))
                return grow(manifest, config)

            corpus.grow = slow_grow  # type: ignore[method-assign]
            await place.until(
                lambda: len(bootstrap.history.versions) == 2, within=60.0, what="a new manifest"
            )
            assert asked == [(1, 2), (2, 2)]
            assert bootstrap.history.newest.topology.shape == (2, 2)
            assert requested_growth(place.directory) is None

    run_virtual(scenario())


def test_growth_that_cannot_be_is_refused_and_the_operator_told_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=MANY, round_seconds=6.0)) as place:
            operator = await place.bootstrap()
            request_growth(place.directory, (20, 20))
            corpus = place.operate()

            def refuse(manifest: Manifest, config: RunConfig) -> ManifestDraft:
                raise ConfigError("273 sequences are too few for 400 centers")

            corpus.grow = refuse  # type: ignore[method-assign]
            await place.until(
                lambda: bool(operator.seen("growth refused")), within=30.0, what="a refusal"
            )
            assert requested_growth(place.directory) is None
            assert [describe(event) for event in operator.events[-2:]] == [
                ("run", "growing to levels 20, 20"),
                ("run", "cannot grow to levels 20, 20: 273 sequences are too few for 400 centers"),
            ]

    run_virtual(scenario())


def test_a_discriminative_phase_is_scored_by_the_peers_and_sharded_by_the_operator(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        routing = RoutingConfig(
            method="discriminative", prefix_tokens=4, router_fraction=0.1, phases=(1,)
        )
        config = little_config(num_rounds=MANY, round_seconds=ROUND)
        config = replace(config, routing=routing)
        async with lab(tmp_path, config) as place:
            everyone = await swarm(place, 4)
            corpus = place.operate()
            operator = everyone[0]
            await place.until(
                lambda: bool(operator.seen("issued")), within=8 * ROUND, what="a new manifest"
            )
            [issued] = operator.seen("issued")
            assert issued["num_phases"] == 1
            [resharding] = operator.seen("resharding")
            assert describe(resharding) == ("run", "sharding the corpus anew, for phase 1")
            assert describe(issued) == (
                "run",
                f"signed version 2 of the manifest, in force from slot {issued['first_slot']} on",
            )
            await until_slot(place, issued["first_slot"] + 1)
            for peer in everyone[1:]:
                [scored] = peer.seen("scored")
                assert in_force(peer) == {2: issued["first_slot"]}
                before = [e for e in peer.seen("contributed") if e["time"] < scored["time"]]
                assert [entry["slot"] for entry in before] == [0], "after one round"
            [scores] = corpus.scores
            assert scores.shape == (10, 4)
            assert (scores < 0).all(), "log-likelihoods"
            assert len({tuple(column.tolist()) for column in scores.T}) == 4
            assert_agreement(everyone)

    run_virtual(scenario())


def test_the_operator_is_told_in_each_phase_that_scores_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in every slot: here nobody scores anything before it was told."""
    step = Scoring.step

    async def scenario() -> None:
        routing = RoutingConfig(
            method="discriminative", prefix_tokens=4, router_fraction=0.1, phases=(1, 2)
        )
        config = replace(little_config(num_rounds=MANY, round_seconds=ROUND), routing=routing)
        async with lab(tmp_path, config) as place:
            operator = (await swarm(place, 4))[0]

            async def late(scoring: Scoring, work: PathWork, **limits: Any) -> bool:
                issued = [entry["time"] for entry in operator.seen("issued")]
                told = [entry["time"] for entry in operator.seen("scores missing")]
                is_told = bool(told) and (not issued or told[-1] > issued[-1])
                return is_told and await step(scoring, work, **limits)

            monkeypatch.setattr(Scoring, "step", late)
            place.operate()
            await place.until(
                lambda: len(operator.seen("issued")) == 2, within=30 * ROUND, what="both phases"
            )
            told = [entry["paths"] for entry in operator.seen("scores missing")]
            assert told.count(sorted(PATHS)) == 2

    run_virtual(scenario())
