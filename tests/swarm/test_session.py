"""What a peer does to the machine and the network that it enters."""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING

import pytest

from dht.addresses import ports_of
from dht.errors import Unreachable
from peer.check import MIN_OPEN_FILES, check_open_files
from peer.config import PeerConfig
from peer.keeper import Keeper
from peer.observe import observe
from peer.providers import Providers
from peer.session import ADDRESS_FILE, find_run, make_node, open_network
from tests.little_run import identity, little_config, make_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.swarm

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def test_a_peer_has_its_port_again_however_it_was_reached(tmp_path: Path) -> None:
    relayed = "/ip4/203.0.113.7/tcp/4/p2p/12D3KooW/p2p-circuit\n"

    async def ports(*announced: str) -> tuple[int, ...]:
        config = PeerConfig(state_dir=tmp_path, host_maddrs=LOOPBACK, announce_maddrs=announced)
        async with open_network(config) as network:
            return ports_of(network.daemon.listening)

    before = asyncio.run(ports())
    assert len(before) == 1
    assert asyncio.run(ports("/ip4/203.0.113.7/tcp/4001")) == before
    (tmp_path / ADDRESS_FILE).write_text(relayed)  # what it knew last
    assert asyncio.run(ports()) == before


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """A limit on open files that a peer would meet; the one that it may raise it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_OPEN_FILES // 2, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_whoever_enters_a_network_may_open_many_files(tmp_path: Path, few_open_files: int) -> None:
    async def main() -> int:
        config = PeerConfig(state_dir=tmp_path, host_maddrs=LOOPBACK)
        async with open_network(config):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    limit = asyncio.run(main())
    assert limit >= min(MIN_OPEN_FILES, few_open_files)
    assert check_open_files().text == f"up to {limit}", "what `check` says is what `join` gets"


def test_too_few_open_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    finding = check_open_files()
    assert not finding.ok
    assert finding.text == "up to 256"
    assert "ulimit" in finding.fix


def test_an_observer_sees_the_swarm_and_is_no_part_of_it(tmp_path: Path) -> None:
    """It is no node of the DHT, which others would go on asking when it is gone."""

    async def main() -> None:
        config = PeerConfig(state_dir=tmp_path, host_maddrs=LOOPBACK)
        async with open_network(config) as network:
            now = network.swarm.now()
            run = make_run(little_config(), operator=identity(1), start_time=now + 1000)
            node = make_node(network, manifest=run.manifest, run_dir=tmp_path / "run")
            for raw in run.blobs:
                node.store.add(raw)
            providers = Providers(node.swarm, node.store, node.blobs)
            async with Keeper(node, providers, keep_all=True).running():
                seen = await observe(tuple(await network.swarm.maddrs()))
                assert not network.swarm.neighbors
                with pytest.raises(Unreachable, match="another peer"):  # it does not ask itself
                    await find_run(network, await network.swarm.maddrs())
            node.events.close()
            assert seen.run == run.digest
            assert len(seen.modules) == len(run.manifest.topology.modules)
            assert {module.holders for module in seen.modules} == {1}

    asyncio.run(main())
