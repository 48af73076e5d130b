"""Looking at a swarm from outside, without an identity of one's own that stays."""

import tempfile
from pathlib import Path

from peer.config import PeerConfig
from peer.session import enter_run, find_run, open_network, run_directory
from peer.status import SwarmStatus, read_status


async def observe(initial_peers: tuple[str, ...]) -> SwarmStatus:
    """The status of the swarm that these addresses belong to."""
    with tempfile.TemporaryDirectory(prefix="dipaco-observer-") as directory:
        # A client: a node of the DHT would stay in the others' routing tables when it is gone.
        config = PeerConfig(
            state_dir=Path(directory), initial_peers=initial_peers, client_mode=True
        )
        async with open_network(config) as network:
            found = await find_run(network, initial_peers)
            run_dir = run_directory(config.state_dir, found.run)
            node = await enter_run(network, found, run_dir)
            try:
                return await read_status(network.swarm, found.run, node.manifest)
            finally:
                node.events.close()
