"""What a peer tells the swarm about itself: its announcement, its heads, what it provides.

Records are renewed well before they expire and withdrawn on leaving, so that a dead peer is gone
from everyone's view within `lifetime_seconds`.
"""

from collections.abc import Set
from dataclasses import dataclass

from dht.errors import Rejected, Unreachable
from dht.records import MAX_LIFETIME_SECONDS, Announcement, Head, ManifestPointer, Record, Scores
from dipaco.topology import ModuleID, PathID
from peer.modules import Held, counted_tokens
from peer.node import Node

MIN_LIFETIME_SECONDS = 12.0
RENEWALS_PER_LIFETIME = 3


@dataclass(slots=True, kw_only=True)
class Progress:
    """The figures of this peer that its announcement carries."""

    tokens: int = 0
    slot_tokens: int = 0
    commits: int = 0
    inner_share: float = 0.0
    valid_nll: float | None = None
    valid_tokens: int = 0


class Presence:
    """Publishes, renews and withdraws this peer's records."""

    def __init__(self, node: Node, *, retiring: Set[ModuleID]) -> None:
        self._node = node
        self._retiring = retiring  # modules held only until enough others hold them
        self.path: PathID | None = None
        self.progress = Progress()
        self.room_bytes: int | None = None  # of memory for training; None: no limit
        self.maddrs: tuple[str, ...] = ()  # by which others reach this peer
        self._heads: dict[ModuleID, tuple[Head, float]] = {}  # as last said, and when
        self.scores: dict[PathID, Scores] = {}  # of the phase that is due, by path
        round_seconds = node.history.first.run_config.rounds.round_seconds
        self.lifetime_seconds = min(
            MAX_LIFETIME_SECONDS, max(MIN_LIFETIME_SECONDS, 1.5 * round_seconds)
        )
        self.renew_seconds = self.lifetime_seconds / RENEWALS_PER_LIFETIME

    async def publish(self) -> None:
        """Renew the announcement and all heads, except what was said only just now."""
        if self.path is not None:
            await self.announce()
        for module in list(self._node.log.held):
            head, (said, time) = self._head(module), self._heads.get(module, (None, 0.0))
            age = self._node.now() - time  # negative after a clock was set back
            if head != said or not 0 <= age <= self.renew_seconds / 2:
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

    def announcement(self) -> Announcement | None:
        """What this peer says of its training; None if it has no path."""
        if self.path is None:
            return None
        node, progress = self._node, self.progress
        traffic, held = node.transport.traffic, node.log.held
        modules = node.history.newest.topology.modules_of(self.path)
        return Announcement(
            peer=node.peer_id,
            run=node.run,
            path=str(self.path),
            round=min((held[module].version for module in modules if module in held), default=0),
            tokens=progress.tokens,
            slot_tokens=progress.slot_tokens,
            room_bytes=self.room_bytes,
            commits=progress.commits,
            inner_share=progress.inner_share,
            sent_bytes=traffic.wire_sent_bytes,
            received_bytes=traffic.wire_received_bytes,
            valid_nll=progress.valid_nll,
            valid_tokens=progress.valid_tokens,
            maddrs=self.maddrs,
        )

    async def announce(self) -> None:
        """Say which path this peer trains, and how far it is."""
        record = self.announcement()
        if record is not None:
            await self._store(record)

    async def publish_head(self, module: ModuleID) -> None:
        """Say which version of a module this peer holds."""
        record = self._head(module)
        if record is not None and await self._store(record):
            self._heads[module] = record, self._node.now()

    async def offer_scores(self, path: PathID, *, phase: int, blob: str) -> None:
        """Say that we have scored the router data with `path`."""
        record = Scores(
            peer=self._node.peer_id, run=self._node.run, path=str(path), phase=phase, blob=blob
        )
        self.scores[path] = record
        await self._store(record)

    async def change_path(self, path: PathID | None) -> None:
        """Withdraw the announcement of the former path, and announce the new one, if any."""
        before = self.announcement()
        self.path = path
        self.progress.valid_nll, self.progress.valid_tokens = None, 0  # of the former one
        if before is not None:
            await self._node.swarm.withdraw(before)
        await self.announce()

    async def withdraw(self) -> None:
        """Take back everything, on leaving."""
        heads = (self._head(module) for module in self._node.log.held)
        records = [self.announcement(), *heads, *self.scores.values()]
        for record in records:
            if record is not None:
                await self._node.swarm.withdraw(record)

    async def withdraw_head(self, module: ModuleID) -> None:
        """Stop being known as a holder of `module`; call before dropping it."""
        record = self._head(module)
        self._heads.pop(module, None)
        if record is not None:
            await self._node.swarm.withdraw(record)

    def _tokens_of_own_path(self, held: Held) -> int:
        """For a head: tokens counted for the one path of a path-specific module."""
        manifest, slot = self._node.manifest, self._node.slot
        if not manifest.topology.has_module(held.module):
            return 0  # of a later version
        paths = manifest.topology.paths_through(held.module)
        if len(paths) > 1:
            return 0
        return counted_tokens(held.chain, paths[0], first_slot=manifest.first_slot, before=slot)

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
            path=str(self.path) if trains else None,
            leaving=module in self._retiring,
            version=held.version,
            certificate=held.certificate.digest if held.certificate else "",
            state=held.state,
            path_tokens=self._tokens_of_own_path(held),
        )

    async def _store(self, record: Record) -> bool:
        try:
            return await self._node.swarm.store(record, self.lifetime_seconds)
        except (Unreachable, Rejected) as error:
            self._node.events.write("not stored", key=record.key, why=str(error))
            return False
