"""Starts real peers on loopback: each has its own p2pd, and all share one event loop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dht.daemon import Daemon, DaemonConfig
from dht.identity import Identity
from dht.kademlia import KademliaSwarm
from peer.rpc import Libp2pTransport
from peer.throttle import Meter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPeer:
    identity: Identity
    daemon: Daemon
    swarm: KademliaSwarm
    transport: Libp2pTransport
    maddr: str

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    async def close(self) -> None:
        await self.transport.close()
        await self.swarm.close()
        await self.daemon.close()


async def start_peer(
    directory: Path,
    name: str,
    *,
    initial_peers: Sequence[str] = (),
    config: DaemonConfig | None = None,
    meter: Meter | None = None,
) -> LocalPeer:
    """Start the peer whose identity is in `directory/name.key`."""
    identity_file = directory / f"{name}.key"
    identity = Identity.load_or_create(identity_file)
    daemon = await Daemon.start(identity_file, config=config or DaemonConfig())
    try:
        swarm = await KademliaSwarm.open(daemon, identity, initial_peers=initial_peers)
    except BaseException:
        await daemon.close()
        raise
    [maddr] = await swarm.maddrs()
    meter = meter or Meter()
    swarm.on_call = meter.called
    transport = Libp2pTransport(swarm.p2p, meter=meter)
    return LocalPeer(
        identity=identity, daemon=daemon, swarm=swarm, transport=transport, maddr=maddr
    )


@asynccontextmanager
async def local_swarm(directory: Path, num_peers: int) -> AsyncIterator[list[LocalPeer]]:
    """`num_peers` peers, of which each knows only the first; all are closed at the end."""
    peers = [await start_peer(directory, "0")]
    try:
        known = [peers[0].maddr]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(start_peer(directory, str(i), initial_peers=known))
                for i in range(1, num_peers)
            ]
        peers += [task.result() for task in tasks]
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))
