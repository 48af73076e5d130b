"""What a peer reads of the swarm to choose a path: who trains what, and how far each path is."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median_low

from dht.keys import announcement_key, head_key
from dht.records import Announcement, Head
from dipaco.footprint import least_training_bytes
from dipaco.topology import ModuleID, PathID
from peer.address_book import Addresses
from peer.assignment import Snapshot, with_slot_under_way
from peer.manifest import Manifest
from peer.modules import counted_tokens
from peer.node import Node


class Survey:
    """Takes snapshots of the swarm, from announcements, heads and the modules held here."""

    def __init__(self, node: Node, *, own: Callable[[], Announcement | None]) -> None:
        self.on_addresses: Callable[[Addresses], None] = lambda addresses: None
        """Told where the others are reached, whenever that is read."""
        self._node = node
        self._own = own  # this peer's announcement, as it would be now

    async def snapshot(self, manifest: Manifest) -> Snapshot:
        """Who trains what, from all announcements; this peer's own line as it knows it.

        To choose a path for a slot, give the `manifest` that will be in force in it.
        """
        node = self._node
        lines: dict[str, tuple[PathID, Announcement]] = {}
        for path in manifest.topology.paths:
            for record in await node.swarm.read(announcement_key(node.run, str(path))):
                if isinstance(record, Announcement):
                    lines[record.peer] = path, record
        lines.pop(node.peer_id, None)
        self.on_addresses({peer: record.maddrs for peer, (_, record) in lines.items()})
        own = self._own()
        if own is not None:
            lines[node.peer_id] = PathID.parse(own.path), own
        snapshot = Snapshot(
            training={peer: path for peer, (path, _) in lines.items()},
            shard_tokens=manifest.shard_tokens,
            slot_tokens={peer: record.slot_tokens for peer, (_, record) in lines.items()},
            room_bytes={
                peer: record.room_bytes
                for peer, (_, record) in lines.items()
                if record.room_bytes is not None
            },
            need_bytes=self._need_bytes(manifest),
            finished=await self._finished(manifest),
        )
        if manifest.first_slot > node.slot:
            return snapshot  # nothing was trained under it yet
        counted = {
            path: await self._counted_tokens(path, manifest) for path in manifest.topology.paths
        }
        return with_slot_under_way(replace(snapshot, tokens=counted))

    async def _finished(self, manifest: Manifest) -> frozenset[PathID]:
        """The paths whose modules all have the last version.

        Of a module that is not held here, that is what the median of its holders says; one that
        nobody holds any more nobody can train on.
        """
        node, num_rounds = self._node, manifest.run_config.rounds.num_rounds
        if node.slot + 1 < num_rounds:
            return frozenset()  # a module has one version per slot at most
        finished: set[ModuleID] = set()
        for module in manifest.topology.modules:
            held = node.log.held.get(module)
            if held is not None:
                versions = [held.version]
            else:
                records = await node.swarm.read(head_key(node.run, str(module)))
                versions = [record.version for record in records if isinstance(record, Head)]
            if not versions or median_low(versions) >= num_rounds:
                finished.add(module)
        topology = manifest.topology
        return frozenset(p for p in topology.paths if finished.issuperset(topology.modules_of(p)))

    async def _counted_tokens(self, path: PathID, manifest: Manifest) -> int:
        """Tokens of a path that certificates count, of earlier slots and under `manifest`.

        Known for certain where this peer holds a module of the path, as it does if a level is
        shared by all; otherwise what the holders of the path's own module say, the median of them.
        """
        node = self._node
        modules = manifest.topology.modules_of(path)
        held = [node.log.held[module] for module in modules if module in node.log.held]
        if held:
            return max(
                counted_tokens(one.chain, path, first_slot=manifest.first_slot, before=node.slot)
                for one in held
            )
        claims: list[int] = []
        for module in modules:
            if manifest.topology.num_paths_through(module) == 1:
                records = await node.swarm.read(head_key(node.run, str(module)))
                claims += [record.path_tokens for record in records if isinstance(record, Head)]
        return median_low(claims) if claims else 0

    def _need_bytes(self, manifest: Manifest) -> dict[PathID, int]:
        """Memory for training, by path; shards are mapped, and need none of their own."""
        config, topology, log = manifest.run_config, manifest.topology, self._node.log
        sizes = {
            path: sum(map(log.num_parameters, topology.modules_of(path))) for path in topology.paths
        }
        return {path: least_training_bytes(config, size) for path, size in sizes.items()}
