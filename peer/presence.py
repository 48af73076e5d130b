"""What a peer tells the swarm about itself: its announcement, its heads, what it provides.

Records are renewed well before they expire and withdrawn on leaving, so that a dead peer is gone
from everyone's view within `lifetime_seconds`.
"""

from collections.abc import Set
from dataclasses import dataclass

from dht.errors import Rejected, Unreachable
from dht.keys import announcement_key
from dht.records import MAX_LIFETIME_SECONDS, Announcement, Head, ManifestPointer, Record, Scores
from dipaco.topology import ModuleID, PathID
from peer.assignment import Snapshot
from peer.node import Node

MIN_LIFETIME_SECONDS = 12.0
RENEWALS_PER_LIFETIME = 3


@dataclass(slots=True, kw_only=True)
class Progress:
    """The figures of this peer that its announcement carries."""

    round: int = 0
    step: int = 0
    tokens: int = 0
    path_tokens: int = 0
    commits: int = 0
    inner_share: float = 0.0
    loss: float | None = None
    valid_nll: float | None = None
    valid_tokens: int = 0


class Presence:
    """Publishes and withdraws this peer's records, and reads those of the others."""

    def __init__(self, node: Node, *, retiring: Set[ModuleID]) -> None:
        self._node = node
        self._retiring = retiring  # modules held still, but no longer announced
        self.path: PathID | None = None
        self.progress = Progress()
        self.scores: dict[PathID, Scores] = {}  # of the phase that is due, by path
        round_seconds = node.history.first.run_config.rounds.round_seconds
        self.lifetime_seconds = min(
            MAX_LIFETIME_SECONDS, max(MIN_LIFETIME_SECONDS, 1.5 * round_seconds)
        )
        self.renew_seconds = self.lifetime_seconds / RENEWALS_PER_LIFETIME

    async def publish(self) -> None:
        """Renew the announcement and all heads."""
        if self.path is not None:
            await self.announce()
        for module in list(self._node.log.held):
            await self.publish_head(module)
        for scores in list(self.scores.values()):
            await self._store(scores)
        await self.point_to_manifest()

    async def point_to_manifest(self) -> None:
        """Say which version of the manifest is the newest."""
        newest = self._node.history.newest
        await self._store(
            ManifestPointer(
                peer=self._node.peer_id,
                run=self._node.run,
                name=newest.name,
                version=newest.version,
                manifest=newest.digest,
            )
        )

    async def announce(self) -> None:
        """Say which path this peer trains, and how far it is."""
        record = self._announcement()
        if record is not None:
            await self._store(record)

    async def publish_head(self, module: ModuleID) -> None:
        """Say which version of a module this peer holds."""
        record = self._head(module)
        if record is not None and module not in self._retiring:
            await self._store(record)

    async def offer_scores(self, path: PathID, *, phase: int, blob: str) -> None:
        """Say that we have scored the router data with `path`."""
        record = Scores(
            peer=self._node.peer_id, run=self._node.run, path=str(path), phase=phase, blob=blob
        )
        self.scores[path] = record
        await self._store(record)

    async def change_path(self, path: PathID) -> None:
        """Withdraw the announcement of the former path, and announce the new one."""
        before = self._announcement()
        self.path = path
        if before is not None:
            await self._node.swarm.withdraw(before)
        await self.announce()

    async def withdraw(self) -> None:
        """Take back everything, on leaving."""
        heads = (self._head(module) for module in self._node.log.held)
        records = [self._announcement(), *heads, *self.scores.values()]
        for record in records:
            if record is not None:
                await self._node.swarm.withdraw(record)

    async def withdraw_head(self, module: ModuleID) -> None:
        """Stop being known as a holder of `module`; call before dropping it."""
        record = self._head(module)
        if record is not None:
            await self._node.swarm.withdraw(record)

    async def snapshot(self) -> Snapshot:
        """Who trains what, from all announcements; this peer's own line as it knows it."""
        node, manifest = self._node, self._node.manifest
        training: dict[str, PathID] = {}
        progress: dict[PathID, float] = {}
        for path in manifest.topology.paths:
            for record in await node.swarm.read(announcement_key(node.run, str(path))):
                if isinstance(record, Announcement):
                    training[record.peer] = path
                    epochs = record.path_tokens / manifest.shard_tokens[path]
                    progress[path] = max(progress.get(path, 0.0), epochs)
        training.pop(node.peer_id, None)
        if self.path is not None:
            training[node.peer_id] = self.path
        return Snapshot(training=training, progress=progress)

    def _announcement(self) -> Announcement | None:
        if self.path is None:
            return None
        traffic, progress = self._node.transport.traffic, self.progress
        return Announcement(
            peer=self._node.peer_id,
            run=self._node.run,
            path=str(self.path),
            round=progress.round,
            step=progress.step,
            tokens=progress.tokens,
            path_tokens=progress.path_tokens,
            commits=progress.commits,
            inner_share=progress.inner_share,
            sent_bytes=traffic.wire_sent_bytes,
            received_bytes=traffic.wire_received_bytes,
            loss=progress.loss,
            valid_nll=progress.valid_nll,
            valid_tokens=progress.valid_tokens,
        )

    def _head(self, module: ModuleID) -> Head | None:
        node = self._node
        held = node.log.held.get(module)
        if held is None:
            return None
        topology = node.history.newest.topology
        trains = self.path is not None and module in topology.modules_of(self.path)
        return Head(
            peer=node.peer_id,
            run=node.run,
            module=str(module),
            role="trainer" if trains else "keeper",
            path=str(self.path) if trains else None,
            version=held.version,
            certificate=held.certificate.digest if held.certificate else "",
            state=held.state,
        )

    async def _store(self, record: Record) -> None:
        try:
            await self._node.swarm.store(record, self.lifetime_seconds)
        except (Unreachable, Rejected) as error:
            self._node.events.write("not stored", key=record.key, why=str(error))
