"""Peers in network namespaces, two of whom nobody can dial."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from dipaco.config import TopologyConfig
from dipaco.inner import PathTrainer
from peer.changes import Changes
from peer.config import PeerConfig
from peer.keeper import Keeper
from peer.providers import Providers
from peer.session import Network, make_node, open_network
from peer.volunteer import Volunteer
from tests.little_run import Run, identity, little_config, make_run
from tests.peer.transport_contract import ECHO, Handlers, ask
from tests.swarm.namespaces import Internet, require_namespaces

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from peer.reachability import Standing
    from tests.swarm.namespaces import Host

pytestmark = pytest.mark.swarm

PORT = 31337
ROUND_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A peer on a host of its own."""

    host: Host
    network: Network
    standing: Standing

    @property
    def peer_id(self) -> str:
        return self.network.identity.peer_id


class Neighborhood:
    """A relay `r`, a public peer `p`, and two behind NAT: `h`, and `c` in client mode."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack

    async def settle(self, internet: Internet) -> None:
        hosts = [internet.host(behind_nat=hidden) for hidden in (False, False, True, True)]
        self.r = await self._open("r", hosts[0], relay_service=True)
        self.p, self.h, self.c = await asyncio.gather(
            self._open("p", hosts[1]),
            self._open("h", hosts[2]),
            self._open("c", hosts[3], client_mode=True),
        )

    async def _open(self, name: str, host: Host, **options: Any) -> Place:
        first = [] if name == "r" else self.r.standing.maddrs
        config = PeerConfig(
            state_dir=self._directory / name,
            initial_peers=tuple(first),
            host_maddrs=(f"/ip4/0.0.0.0/tcp/{PORT}",),
            **options,
        )
        network = await self._stack.enter_async_context(
            open_network(config, launcher=host.launcher)
        )
        await Handlers().serve(network.transport)
        asked = [] if name == "r" else [self.r.peer_id]
        standing = await network.reachability.settle(asked)
        return Place(host=host, network=network, standing=standing)

    @property
    def places(self) -> list[Place]:
        return [self.r, self.p, self.h, self.c]


@asynccontextmanager
async def neighborhood(directory: Path) -> AsyncIterator[Neighborhood]:
    require_namespaces()
    with Internet() as internet:
        async with AsyncExitStack() as stack:
            place = Neighborhood(directory, stack)
            await place.settle(internet)
            yield place


def check_standing(n: Neighborhood) -> None:
    """Everyone knows how it is reached, and says so in one line."""
    assert n.r.standing.is_dialled is None, "it was there first"
    assert n.p.standing.is_dialled
    assert n.p.standing.text.startswith(f"reachable from outside at /ip4/{n.p.host.address}/tcp")
    for hidden in (n.h, n.c):
        assert hidden.standing.is_dialled is False
        assert hidden.standing.relays == (n.r.peer_id,)
        assert f"taking part through relay {n.r.peer_id}" in hidden.standing.text
    assert "forward TCP port 31337" in n.h.standing.text
    assert "forward" not in n.c.standing.text, "it listens nowhere"


def check_nobody_dials_the_hidden(n: Neighborhood) -> None:
    """The fault is there: they cannot be dialled where they listen, nor at their routers."""
    for dialler in (n.r, n.p):
        for hidden in (n.h.host, n.c.host):
            assert not dialler.host.reaches(hidden.address, PORT)
            assert not dialler.host.reaches(hidden.seen_address, PORT)
    assert n.h.host.reaches(n.p.host.seen_address, PORT)
    assert n.h.host.reaches("127.0.0.1", PORT), "it listens"
    assert not n.c.host.reaches("127.0.0.1", PORT), "it does not, in client mode"


async def check_everyone_asks_everyone(n: Neighborhood) -> None:
    for asker in n.places:
        for peer in n.places:
            if peer is not asker:
                answer = await ask(asker.network.transport, peer.peer_id, ECHO, b"hi")
                assert answer == asker.peer_id.encode() + b" hi"
    maddrs = (await n.h.network.swarm.connections())[n.c.peer_id]
    assert all(f"/p2p/{n.r.peer_id}/p2p-circuit" in maddr for maddr in maddrs), "by the relay"


class Training:
    """The peers of a neighborhood in one run of a single path; the relay keeps it."""

    def __init__(self, n: Neighborhood, directory: Path, stack: AsyncExitStack) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {}
        self._changes = Changes()
        self._n = n
        self._directory = directory
        self._stack = stack

    async def start(self) -> None:
        now = self._n.r.network.swarm.now()
        config = little_config(num_rounds=20, round_seconds=ROUND_SECONDS, blocking=False)
        config = replace(config, topology=TopologyConfig(levels=(1,)))
        run = make_run(config, operator=identity(1), start_time=now + 2 * ROUND_SECONDS)
        for place in self._n.places:
            await self._join(place, run)

    async def _join(self, place: Place, run: Run) -> None:
        is_first = place is self._n.r
        run_dir = self._directory / place.peer_id
        node = make_node(place.network, manifest=run.manifest, run_dir=run_dir)
        self._stack.callback(node.events.close)
        node.events.listen(lambda entry: self._note(place, entry))
        providers = Providers(node.swarm, node.store, node.blobs)
        providers.hints.append(self._n.r.peer_id)
        for raw in run.blobs if is_first else ():
            node.store.add(raw)
        keeper = Keeper(node, providers, keep_all=is_first)
        await self._stack.enter_async_context(keeper.running())
        if not is_first:
            volunteer = Volunteer(
                keeper,
                lambda manifest, path, shard: PathTrainer(
                    manifest.run_config, manifest.topology, path, shard
                ),
            )
            task = asyncio.create_task(volunteer.run())
            self._stack.push_async_callback(asyncio.wait, {task})
            self._stack.callback(volunteer.stop.set)

    def _note(self, place: Place, entry: dict[str, Any]) -> None:
        self.events.setdefault(place.peer_id, []).append(entry)
        self._changes.notify()

    def seen(self, place: Place, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events.get(place.peer_id, []) if entry["event"] == event]

    async def until_seen(self, place: Place, event: str, *, within_seconds: float) -> bool:
        return await self._changes.until(lambda: bool(self.seen(place, event)), within_seconds)

    async def until_counted(self, peers: set[str], *, within_seconds: float) -> bool:
        """Until every place has applied contributions of all these peers."""
        return await self._changes.until(
            lambda: all(self.counted(place) >= peers for place in self._n.places), within_seconds
        )

    def counted(self, place: Place) -> set[str]:
        """Whose contributions are in the versions that `place` applied."""
        return {peer for entry in self.seen(place, "version") for peer in entry["contributors"]}


async def lose_p2pd(training: Training, place: Place) -> None:
    """Kill the p2pd of a peer that has just begun to train."""
    assert await training.until_seen(place, "first step", within_seconds=20)
    assert training.counted(place) == set()
    os.kill(place.network.daemon.pid, signal.SIGKILL)
    assert await training.until_seen(place, "p2pd restarted", within_seconds=30)


def test_peers_that_nobody_can_dial_take_part_even_after_losing_p2pd(tmp_path: Path) -> None:
    async def main() -> None:
        async with neighborhood(tmp_path) as n, AsyncExitStack() as stack:
            check_standing(n)
            await check_everyone_asks_everyone(n)
            check_nobody_dials_the_hidden(n)
            training = Training(n, tmp_path / "runs", stack)
            await training.start()
            await lose_p2pd(training, n.h)
            trainers = {place.peer_id for place in (n.p, n.h, n.c)}
            assert await training.until_counted(trainers, within_seconds=10 * ROUND_SECONDS)
            maddrs = tuple(await n.h.network.swarm.maddrs())
            assert replace(n.h.standing, maddrs=maddrs).relays == (n.r.peer_id,)

    asyncio.run(main())
