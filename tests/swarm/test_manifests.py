"""A run grows while it is trained, over real libp2p, and a newcomer finds its newest manifest."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootstrap.corpus import PreparedCorpus
from bootstrap.growth import request_growth
from bootstrap.node import load_blobs
from bootstrap.operator import Operator
from dht.identity import Identity
from dipaco.config import TopologyConfig
from dipaco.start import Start
from peer.config import PeerConfig
from peer.devices import choose_device, trainer_factory
from peer.keeper import Keeper
from peer.providers import Providers
from peer.session import enter_run, find_run, make_node
from peer.volunteer import Volunteer
from tests.little_run import sign_run
from tests.swarm.local import LocalPeer, local_swarm
from tests.swarm.place import prepare
from tests.swarm.test_oracle import network_of

ROUND_SECONDS = 2.5
START_IN_SECONDS = 4.0
WITHIN_SECONDS = 60.0


@pytest.mark.swarm
def test_a_run_grows_and_newcomers_find_out(tmp_path: Path, prepared: Start) -> None:
    config = prepared.config
    config = replace(
        config,
        topology=TopologyConfig(levels=(1, 1)),
        outer=replace(config.outer, wire_format="float32"),
        rounds=replace(config.rounds, num_rounds=1000, round_seconds=ROUND_SECONDS),
    )
    start = prepare(prepared, config, tmp_path)
    asyncio.run(grow_a_swarm(tmp_path, start))


async def grow_a_swarm(directory: Path, start: Start) -> None:
    states: dict[tuple[str, int], set[str]] = {}
    trained: set[str] = set()

    def listen(entry: dict[str, Any]) -> None:
        assert entry["event"] != "diverged", entry
        if entry["event"] in ("version", "caught up"):
            states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])
        if entry["event"] == "contributed":
            trained.add(entry["path"])

    async with local_swarm(directory, 4) as peers, AsyncExitStack() as stack:
        first = sign_run(directory, start, start_time=time.time() + START_IN_SECONDS)
        keepers = []
        for number, peer in enumerate(peers[:3]):
            run_dir = directory / f"peer{number}"
            node = make_node(network_of(peer), manifest=first, run_dir=run_dir)
            stack.callback(node.events.close)
            node.events.listen(listen)
            providers = Providers(node.swarm, node.store, node.blobs)
            providers.hints.append(peers[0].peer_id)
            keepers.append(Keeper(node, providers, keep_all=number == 0))
        bootstrap = keepers[0].node
        load_blobs(bootstrap.store, start, directory)
        make_trainer = trainer_factory(
            choose_device(PeerConfig(device="cpu", threads=1), start.config, start.topology)
        )
        for keeper in keepers:
            await stack.enter_async_context(keeper.running())
        corpus = PreparedCorpus(start, directory, bootstrap.store)
        key = Identity.load_or_create(directory / "identity")
        operator = Operator(keepers[0], corpus, identity=key, directory=directory)
        keepers[0].background.start(operator.run(), "operator")
        volunteers = [Volunteer(keeper, make_trainer) for keeper in keepers[1:]]
        trainings = [asyncio.create_task(volunteer.run()) for volunteer in volunteers]
        request_growth(directory, (2, 1))
        async with asyncio.timeout(WITHIN_SECONDS):
            while not (trained >= {"0.0", "1.0"} and any(name == "1.1" for name, _ in states)):
                for training in trainings:
                    assert not training.done(), training.result()
                await asyncio.sleep(0.1)
        assert all(len(digests) == 1 for digests in states.values())
        newest = bootstrap.history.newest.digest
        await assert_a_newcomer_finds(newest, peers[3], peers[1], directory / "newcomer")
        for volunteer in volunteers:
            volunteer.stop.set()
        await asyncio.gather(*trainings)


async def assert_a_newcomer_finds(
    newest: str, newcomer: LocalPeer, through: LocalPeer, run_dir: Path
) -> None:
    network = network_of(newcomer)
    found = await find_run(network, (through.maddr,))
    node = await enter_run(network, found, run_dir)
    node.events.close()
    assert node.history.newest.digest == newest
    assert node.history.newest.version == 2
