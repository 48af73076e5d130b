"""Real processes over real libp2p: kills, restarts, newcomers, good manners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dipaco.start import Start
from tests.swarm.place import START_IN_SECONDS, Place, Process, leave

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(600)]

# For what no promise limits: a process starts, and trains at low priority, on a busy machine.
PATIENCE_SECONDS = 180
ROUND_SECONDS = 6.0


def applied(processes: list[Process]) -> dict[tuple[str, int], set[str]]:
    """Every state that any process applied, by module and version."""
    states: dict[tuple[str, int], set[str]] = {}
    for process in processes:
        for entry in [*process.seen("version"), *process.seen("caught up")]:
            states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])
    return states


@pytest.fixture
def place_with(tmp_path: Path, prepared: Start) -> Iterator[Callable[..., Place]]:
    """Makes a place whose rounds are as told."""
    places: list[Place] = []

    def make(**rounds: Any) -> Place:
        config = prepared.config
        config = replace(
            config,
            outer=replace(config.outer, wire_format="int8"),
            rounds=replace(config.rounds, num_rounds=1000, inner_steps=20, **rounds),
        )
        places.append(Place(tmp_path, prepared, config))
        return places[-1]

    yield make
    for place in places:
        place.close()


def test_a_swarm_survives_kills_and_its_bootstrap_node(place_with: Callable[..., Place]) -> None:
    place = place_with(round_seconds=ROUND_SECONDS)
    bootstrap = place.serve()
    peers = [place.join(f"peer{n}", bootstrap.address) for n in range(3)]
    place.until(
        lambda: all(p.seen("version") and p.seen("contributed") for p in peers),
        within=START_IN_SECONDS + PATIENCE_SECONDS,
    )

    victim = peers[0]
    p2pds = victim.children
    assert p2pds, "a peer has a p2pd"
    victim.popen.kill()
    victim.popen.wait()
    psutil.wait_procs(p2pds, timeout=5)
    assert not any(p2pd.is_running() for p2pd in p2pds), "p2pd dies with its peer"
    after_kill = newest([bootstrap, *peers[1:]])
    contributed = [len(peer.seen("contributed")) for peer in peers[1:]]
    place.until(
        lambda: all(
            len(peer.seen("contributed")) > before
            for peer, before in zip(peers[1:], contributed, strict=True)
        ),
        within=PATIENCE_SECONDS,
    )
    # Not every module: one that only the victim trained waits until somebody takes its path.
    trained = {module for peer in peers[1:] for module in last_committed(peer)}
    place.until(
        lambda: all(newest(peers[1:]).get(m, 0) > after_kill.get(m, 0) for m in trained),
        within=4 * ROUND_SECONDS + 30,
    )

    before = len(victim.seen("contributed"))
    again = place.join("peer0", bootstrap.address)
    place.until(lambda: len(again.seen("contributed")) > before, within=PATIENCE_SECONDS)

    leave([bootstrap])
    limits = ("--max-mbps", "20", "--disk-limit", "1GB", "--memory-limit", "4 GB")
    newcomer = place.join("late", peers[1].address, *limits)
    place.until(lambda: newcomer.seen("contributed"), within=PATIENCE_SECONDS)
    place.until(lambda: len(newcomer.seen("version")) > 3, within=PATIENCE_SECONDS)

    everyone = [peers[1], peers[2], again, newcomer]
    leave(everyone)
    assert all(len(digests) == 1 for digests in applied([bootstrap, *everyone]).values())
    assert not any(process.seen("diverged") for process in everyone)


def test_a_swarm_finds_together_again_by_itself(place_with: Callable[..., Place]) -> None:
    """A bootstrap node that was away for a while, and then everyone: by the same commands."""
    place = place_with(round_seconds=4.0)
    bootstrap = place.serve()
    first_address = bootstrap.address
    peers = [place.join(f"peer{n}", first_address) for n in range(2)]
    place.until(
        lambda: all(p.seen("version") for p in [bootstrap, *peers]),
        within=START_IN_SECONDS + PATIENCE_SECONDS,
    )
    leave([bootstrap])
    left_with = newest([bootstrap])
    place.until(
        lambda: any(newest(peers).get(m, 0) > version + 1 for m, version in left_with.items()),
        within=PATIENCE_SECONDS,
    )
    bootstrap = place.serve()
    missed = newest(peers)
    place.until(
        lambda: all(newest([bootstrap]).get(m, 0) >= version for m, version in missed.items()),
        within=PATIENCE_SECONDS,
    )
    assert "`--start-in` has no effect" in bootstrap.log

    assert place.sockets
    leave([bootstrap, *peers])
    assert not place.sockets
    last_slot = peers[0].seen("contributed")[-1]["slot"]
    alone = place.join("peer0", first_address)
    place.until(lambda: alone.seen("contributed")[-1]["slot"] > last_slot, within=PATIENCE_SECONDS)
    assert "nobody answers" in alone.log
    both = [alone, place.join("peer1", first_address)]

    def together() -> bool:
        peer_ids = {peer.seen("started")[-1]["peer"] for peer in both}
        versions = (e for e in alone.seen("version") if e["trained_slot"] > last_slot)
        return any(peer_ids <= set(e["contributors"]) for e in versions)

    place.until(together, within=PATIENCE_SECONDS)
    leave(both)
    assert all(len(digests) == 1 for digests in applied([bootstrap, *peers]).values())


def newest(processes: list[Process]) -> dict[str, int]:
    versions: dict[str, int] = {}
    for module, version in applied(processes):
        versions[module] = max(version, versions.get(module, 0))
    return versions


def last_committed(process: Process) -> set[str]:
    """The modules that a process committed to in its last slot."""
    events = process.seen("committed")
    return {event["module"] for event in events if event["slot"] == events[-1]["slot"]}
