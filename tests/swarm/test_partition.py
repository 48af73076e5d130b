"""A network is cut in two for a moment, and the swarm is whole again soon after it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from dht.keys import provider_key
from dht.records import Provider
from peer.config import PeerConfig
from peer.session import Network, open_network
from tests.swarm.namespaces import Internet, require_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.swarm.namespaces import Host

pytestmark = pytest.mark.swarm

PORT = 31337
UNTIL_SECONDS = 20.0
DIGEST = "d" * 64


async def open_all(hosts: list[Host], directory: Path, stack: AsyncExitStack) -> list[Network]:
    """A peer on each host; all but the first enter by the first."""
    networks: list[Network] = []
    for number, host in enumerate(hosts):
        config = PeerConfig(
            state_dir=directory / str(number),
            host_maddrs=(f"/ip4/0.0.0.0/tcp/{PORT}",),
            initial_peers=tuple(
                f"/ip4/{hosts[0].address}/tcp/{PORT}/p2p/{first.identity.peer_id}"
                for first in networks[:1]
            ),
        )
        opening = open_network(config, launcher=host.launcher)
        networks.append(await stack.enter_async_context(opening))
    return networks


def route(change: str, hosts: list[Host], others: list[Host]) -> None:
    """Let nothing from `hosts` get to `others` (`add`), or again (`del`)."""
    for host in hosts:
        for other in others:
            host.run("ip", "route", change, "blackhole", f"{other.address}/32")


def ids(networks: Iterable[Network]) -> set[str]:
    return {network.identity.peer_id for network in networks}


async def publish(networks: list[Network]) -> None:
    for network in networks:
        assert await network.swarm.store(Provider(peer=network.identity.peer_id, digest=DIGEST), 60)


async def seen(network: Network) -> set[str]:
    """Whose records a peer sees."""
    return {record.peer for record in await network.swarm.read(provider_key(DIGEST))}


async def until(is_so: Callable[[list[set[str]]], bool], networks: list[Network]) -> None:
    """Let all of them read until that is so: who is asked and does not answer is forgotten."""
    async with asyncio.timeout(UNTIL_SECONDS):
        while not is_so(await asyncio.gather(*(seen(network) for network in networks))):
            pass


def test_a_dht_that_was_cut_in_two_grows_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_namespaces()
    monkeypatch.setattr("dht.kademlia.RPC_SECONDS", 1.0)
    monkeypatch.setattr("peer.watchdog.REJOIN_SECONDS", 0.5)

    async def main() -> None:
        with Internet() as internet:
            hosts = [internet.host() for _ in range(4)]
            async with AsyncExitStack() as stack:
                networks = await open_all(hosts, tmp_path, stack)
                halves = networks[:2], networks[2:]

                def is_whole(_: object) -> bool:
                    return all(len(network.swarm.neighbors) == 3 for network in networks)

                def is_cut(_: object) -> bool:
                    return all(n.swarm.neighbors < ids(half) for half in halves for n in half)

                def is_read(read: list[set[str]]) -> bool:
                    """It takes some seconds until one that did not answer is asked again."""
                    return all(peers == ids(networks) for peers in read)

                await until(is_whole, networks)
                route("add", hosts[2:], hosts[:2])
                await until(is_cut, networks)
                for half in halves:
                    await publish(half)
                    for network in half:
                        assert await seen(network) == ids(half), "the network is cut"
                route("del", hosts[2:], hosts[:2])
                await until(is_read, networks)

    asyncio.run(main())
