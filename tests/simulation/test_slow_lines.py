"""Slow uplinks: who needs longer than an attempt gives is waited for, if it can come in time."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dipaco.compression import encoded_bytes
from dipaco.config import ModelConfig, TopologyConfig
from dipaco.topology import ModuleID
from peer.attempt import pull_seconds
from peer.memory import Line
from peer.messages import Commitment, sign
from tests.lab import Lab, lab
from tests.little_run import identity, little_config
from tests.virtual_clock import run_virtual

ROUND = 60.0  # virtual seconds; a member first gets 6 of them to pull
# Three others pull what is one chunk here from its sender, so it goes over the slow line thrice.
MODULE = ModuleID(1, 0)


@pytest.mark.parametrize(("upload_seconds", "is_counted"), [(4.0, True), (600.0, False)])
def test_a_slow_uplink_counts_if_its_bytes_can_come_in_time_and_delays_nobody_else(
    tmp_path: Path, upload_seconds: float, is_counted: bool
) -> None:
    config = little_config(num_rounds=100, round_seconds=ROUND, blocking=False)
    model = ModelConfig(**{**config.to_dict()["model"], "width": 64, "ffn_width": 512})
    config = replace(config, model=model, topology=TopologyConfig(levels=(1,)))

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=8.0) for n in range(3)]
            slow, log = peers[0], peers[1].keeper.node.log
            await place.until(
                lambda: all(p.versions().get(str(MODULE), 0) >= 2 for p in peers),
                within=5 * ROUND,
                what="two versions over good lines",
            )
            size = encoded_bytes("float32", log.num_parameters(MODULE))
            line = Line(bandwidth_bytes_per_second=size / upload_seconds)
            place.network.lines[slow.peer_id] = line
            before = log.held[MODULE].version
            await place.until(
                lambda: log.held[MODULE].version >= before + 5,
                within=7 * ROUND,
                what="five more versions",
            )
            later = log.held[MODULE].after(before + 2)  # the first ones measured the line
            counts = Counter(peer for made in later for peer in made.proposal.contributors)
            assert counts[slow.peer_id] == (len(later) if is_counted else 0)
            assert all(counts[peer.peer_id] == len(later) for peer in peers[1:])
            for made in later:
                assert made.ballot.slot == made.proposal.slot, "in the slot that it was trained in"
            asked = Counter(e["slot"] for e in peers[1].seen("reducing"))
            assert max(asked.values()) <= 2, "once per module and slot"

    run_virtual(scenario())


@pytest.mark.parametrize("is_needed", [False, True])
def test_what_is_offered_anew_is_not_pulled_in_its_old_form_too_unless_it_was_agreed_on(
    tmp_path: Path, is_needed: bool
) -> None:
    """Two offers of one peer, and a line over which neither comes."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            keeper = (await place.bootstrap()).keeper
            await place.until(lambda: keeper.node.slot >= 1, within=4 * ROUND, what="a second slot")
            pulling: list[str] = []

            async def fetch(digest: str, *_: object, **__: object) -> None:
                pulling.append(digest)
                try:
                    await asyncio.Event().wait()
                finally:
                    pulling.remove(digest)

            keeper.node.blobs.fetch = fetch  # type: ignore[method-assign]
            contributions = keeper.member.contributions
            offers = [offer(place, slot=slot) for slot in (0, 1)]
            contributions.add(offers[0], sender=OFFERER.peer_id, is_asked_for=False)
            need = asyncio.create_task(contributions.obtain(offers[:is_needed], [], 9.0))
            await asyncio.sleep(0.1)
            assert pulling == [offers[0].blob]
            contributions.add(offers[1], sender=OFFERER.peer_id, is_asked_for=False)
            await asyncio.sleep(0.1)
            assert pulling == [o.blob for o in offers[0 if is_needed else 1 :]]
            assert await need is not is_needed

    run_virtual(scenario())


OFFERER = identity(77)


def offer(place: Lab, *, slot: int) -> Commitment:
    """A commitment to the module that all paths share, whose blob is named like its slot."""
    node = place.peers["bootstrap"].keeper.node
    module = ModuleID(0, 0)
    return sign(
        Commitment(
            peer=OFFERER.peer_id,
            run=node.run,
            manifest=node.run,
            module=str(module),
            slot=slot,
            base_version=0,
            base_state=node.history.origin(module).state.digest,
            path="0.0",
            tokens=1,
            blob=f"{slot:064x}",
            blob_bytes=encoded_bytes("float32", node.log.num_parameters(module)),
        ),
        OFFERER,
    )


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, 0.0),
        ({"a": 100.0, "b": 100.0, "c": 100.0}, 6.0),  # 300 bytes by the best line, twice as long
        ({"a": 100.0, "b": 100.0, "c": 10.0}, 20.0),  # the slow uplink decides
        ({"a": 100.0, "b": 100.0, "c": 5.0}, 30.0),  # twice as long would be over the limit
        ({"a": 100.0, "b": 100.0, "c": 1.0}, 6.0),  # hopeless: not waited for
        ({"a": 1.0}, 30.0),
    ],
)
def test_how_long_to_wait_follows_from_what_was_measured(
    rates: dict[str, float], expected: float
) -> None:
    num_bytes = dict.fromkeys("abc", 100)
    assert pull_seconds(num_bytes, rates, limit_seconds=30.0) == pytest.approx(expected)
