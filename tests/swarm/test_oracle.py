"""A faultless swarm over real libp2p ends with the bytes that one machine computes."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootstrap.node import load_blobs
from dipaco.reference import train
from dipaco.start import Start
from peer.config import PeerConfig
from peer.devices import choose_device, trainer_factory
from peer.keeper import Keeper
from peer.providers import Providers
from peer.reachability import Reachability
from peer.session import Network, make_node
from peer.volunteer import Volunteer
from peer.watchdog import Watchdog
from tests.little_run import sign_run
from tests.swarm.local import LocalPeer, local_swarm
from tests.swarm.place import prepare

NUM_ROUNDS = 3
START_IN_SECONDS = 10.0


@pytest.mark.swarm
def test_the_swarm_reproduces_the_oracle(tmp_path: Path, prepared: Start) -> None:
    """In float32; in the default format it does in tests/simulation."""
    config = prepared.config
    config = replace(
        config,
        outer=replace(config.outer, wire_format="float32"),
        rounds=replace(
            config.rounds, num_rounds=NUM_ROUNDS, round_seconds=6.0, inner_steps=4, blocking=True
        ),
    )
    start = prepare(prepared, config, tmp_path / "run")
    states = asyncio.run(run_swarm(tmp_path))
    assert {version for _, version in states} == set(range(1, NUM_ROUNDS + 1))
    assert all(len(digests) == 1 for digests in states.values())
    oracle = train(start, tmp_path / "oracle", num_rounds=NUM_ROUNDS)
    final = {m: digests for (m, version), digests in states.items() if version == NUM_ROUNDS}
    assert final == {str(module): {digest} for module, digest in oracle.digests.items()}


async def run_swarm(directory: Path) -> dict[tuple[str, int], set[str]]:
    """Five peers, one of which trains nothing; all states they applied, by module and version."""
    start = Start.load(directory / "run" / "start")
    states: dict[tuple[str, int], set[str]] = {}

    def listen(entry: dict[str, Any]) -> None:
        assert entry["event"] not in ("diverged", "fork", "error"), entry
        if entry["event"] in ("version", "caught up"):
            states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])

    async with local_swarm(directory, 5) as peers, AsyncExitStack() as stack:
        manifest = sign_run(directory / "run", start, start_time=time.time() + START_IN_SECONDS)
        keepers = []
        for number, peer in enumerate(peers):
            node = make_node(
                network_of(peer), manifest=manifest, run_dir=directory / f"peer{number}"
            )
            stack.callback(node.events.close)
            node.events.listen(listen)
            providers = Providers(node.swarm, node.store, node.blobs)
            providers.hints.append(peers[0].peer_id)
            keepers.append(Keeper(node, providers, keep_all=number == 0))
        load_blobs(keepers[0].node.store, start, directory / "run")
        choice = choose_device(PeerConfig(device="cpu"), start.config, start.topology)
        make_trainer = trainer_factory(choice)
        trainings = []
        for number, keeper in enumerate(keepers):
            await stack.enter_async_context(keeper.running())
            if number > 0:
                volunteer = Volunteer(keeper, make_trainer)
                has_path = asyncio.Event()
                keeper.node.events.listen(
                    lambda entry, event=has_path: (  # type: ignore[misc]
                        event.set() if entry["event"] == "path" else None
                    )
                )
                trainings.append(asyncio.create_task(volunteer.run()))
                await asyncio.wait_for(has_path.wait(), START_IN_SECONDS)
        await asyncio.wait_for(asyncio.gather(*trainings), 60)
    return states


def network_of(peer: LocalPeer) -> Network:
    watchdog = Watchdog(peer.daemon, peer.swarm, peer.transport)
    return Network(
        identity=peer.identity,
        daemon=peer.daemon,
        swarm=peer.swarm,
        transport=peer.transport,
        watchdog=watchdog,
        reachability=Reachability(peer.swarm, peer.transport, watchdog),
    )
