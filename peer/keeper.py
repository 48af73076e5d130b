"""A peer's life without training: it holds modules and blobs, attends their rounds, serves them.

A volunteer is this plus a path to train; a bootstrap node is this and nothing more. Which modules
and shards a peer keeps besides its own follows from its ID (`assignment.keeps`), so that a module
survives when everyone who trained it leaves (promise P6).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from dht.errors import SwarmError
from dipaco.topology import ModuleID, PathID
from peer.assignment import Snapshot, assign_paths, keeps, module_name, shard_name
from peer.background import Background
from peer.blob_server import BlobServer
from peer.boundary import guarded
from peer.catchup import CatchUp
from peer.certificate import may_rebuild
from peer.chain_server import serve_chains
from peer.changes import Changes
from peer.committer import Committer
from peer.discovery import Discovery
from peer.heads import Heads
from peer.hello import serve_hello
from peer.housekeeping import Housekeeping
from peer.limits import affordable, duty_module_bytes
from peer.manifest import BlobRef, Manifest
from peer.member import Member
from peer.messages import Certificate
from peer.node import Node
from peer.presence import Presence
from peer.providers import Providers
from peer.round import Rounds
from peer.survey import Survey

DUTY_SECONDS_MAX = 30.0  # between two looks at who keeps what, when slots are long
RETIRE_SLOTS = 2  # for which a module is still held that no longer falls to this peer


class Keeper:
    """Runs one peer's part in the rounds of every module that it holds."""

    def __init__(
        self,
        node: Node,
        providers: Providers,
        *,
        keep_all: bool = False,
        duty_bytes: int | None = None,
    ) -> None:
        round_seconds = node.history.first.run_config.rounds.round_seconds
        self.node = node
        self.providers = providers
        self.snapshot = Snapshot(training={}, shard_tokens=node.manifest.shard_tokens)
        self.versions = Changes()  # notified whenever a held module has a new version
        self.background = Background(node.events)  # what runs until this peer leaves
        self._keep_all = keep_all
        self._duty_bytes = duty_bytes  # on disk, for what is kept for others; None: no limit
        self._declined: list[str] = []
        self._own: frozenset[ModuleID] = frozenset()
        self._own_shard: PathID | None = None
        self._retiring: dict[ModuleID, int] = {}  # the slot since when a held module is not wanted
        self._behind: set[ModuleID] = set()  # for which a catch-up is under way
        self._attended: dict[ModuleID, int] = {}
        self._held_changed = Changes()
        self.heads = Heads(node.swarm, node.run, memory_seconds=round_seconds)
        self.discovery = Discovery(node)
        self.member = Member(
            node,
            self.heads,
            on_version=self._on_version,
            on_behind=self._on_behind,
            on_manifest=self._on_manifest,
        )
        self.presence = Presence(node, retiring=self.member.retiring)
        self.survey = Survey(node, own=self.presence.announcement)
        self.committer = Committer(node, self.member, self.heads)
        self.rounds = Rounds(node, self.member, self.heads, self.committer)
        self.catch_up = CatchUp(node, self.member, self.heads, providers)
        self._housekeeping = Housekeeping(node, self.member, self.presence)
        node.store.on_full = lambda excess_bytes: self._housekeeping.make_room(
            excess_bytes, own_shard=self._own_shard
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve, attend and keep inside this context; leave the swarm in good order at its end."""
        self.node.events.write(
            "started", run=self.node.run, peer=self.node.peer_id, slot=self.node.slot
        )
        await BlobServer(self.node.store).serve(self.node.transport)
        await serve_hello(self.node)
        await serve_chains(self.node)
        await self.member.serve()
        self.background.open()
        self.background.start(self._attend_slots(), "rounds")
        self.background.start(self._do_duties(), "duties")
        self.background.start(self._watch_manifests(), "manifests")
        self.background.start(self._renew(), "presence")
        try:
            await guarded(self._take_up(), "modules on disk", self.node.events)
            yield
        finally:
            await self.background.close()
            await self._leave()

    async def hold(self, modules: Iterable[ModuleID]) -> bool:
        """Hold these modules at their newest versions and say so; False if one cannot be had.

        Raises `NotYet` if that may change soon, after all that can be had are held.
        """
        holding = (self._hold(module) for module in modules)
        found = await asyncio.gather(*holding, return_exceptions=True)
        self._held_changed.notify()
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return all(found)

    async def _take_up(self) -> None:
        """After a restart: hold what we held, whatever we are going to train.

        First what we have a seat in, else we would count for its quorum until the next roster, and
        could not vote. The rest may be all that is left of it anywhere; what is not will be given
        up as any duty is.
        """
        node = self.node
        newest = await node.offload(node.log.resumable)
        seated = [
            module
            for module, certificates in newest.items()
            if certificates[-1].proposal.slot >= node.slot - RETIRE_SLOTS
            and node.peer_id in {seat.peer for seat in certificates[-1].proposal.next_roster}
        ]
        try:
            await self.hold(seated)
        finally:
            self.background.start(self.hold(set(newest).difference(seated)), "modules on disk")

    def own(self, modules: Iterable[ModuleID], shard: PathID) -> None:
        """Modules and shard that this peer trains on: never dropped while it does."""
        self._own = frozenset(modules)
        self._own_shard = shard
        for module in self._own:
            self._stay(module)

    async def look_around(self) -> Snapshot:
        """A fresh snapshot of who trains what."""
        self.snapshot = await self.survey.snapshot(self.node.manifest)
        return self.snapshot

    async def look_for_manifest(self) -> None:
        """Take up the newest manifest that anyone points to, and point to it."""
        if await self.discovery.look():
            await self.presence.point_to_manifest()

    async def _hold(self, module: ModuleID) -> bool:
        if module in self.node.log.held:
            return True
        if not await self.catch_up.open(module):
            return False
        await self.presence.publish_head(module)
        return True

    def _on_version(self, module: ModuleID, certificate: Certificate) -> None:
        self.versions.notify()
        self.background.start(self.presence.publish_head(module), f"head of {module}")

    def _on_behind(self, module: ModuleID) -> None:
        """Whatever shows that, and however often: one look at a time is enough."""
        if module not in self._behind and self.background.is_open:
            self._behind.add(module)
            self.background.start(self._catch_up(module), f"catch-up of {module}")

    async def _catch_up(self, module: ModuleID) -> None:
        try:
            await self.catch_up.refresh(module)
        finally:
            self._behind.discard(module)

    def _on_manifest(self, digest: str, peer: str) -> None:
        self.background.start(self._ask_for_manifest(digest, peer), "manifest")

    async def _ask_for_manifest(self, digest: str, peer: str) -> None:
        if await self.discovery.ask(digest, peer):
            await self.presence.point_to_manifest()

    async def _watch_manifests(self) -> None:
        """Every slot, since a later version says in which slot it comes into force."""
        round_seconds = self.node.history.first.run_config.rounds.round_seconds
        while True:
            await guarded(self.look_for_manifest(), "manifests", self.node.events)
            await asyncio.sleep(min(round_seconds, DUTY_SECONDS_MAX))

    async def _attend_slots(self) -> None:
        node = self.node
        while True:
            slot = node.slot
            await guarded(self._attend_slot(slot), "rounds", node.events)
            pause = node.history.first.slot_start(slot + 1) - node.now()
            attended = set(node.log.held)
            await self._held_changed.until(
                lambda attended=attended: set(node.log.held) != attended,  # type: ignore[misc]
                max(0.01, pause),
            )

    async def _attend_slot(self, slot: int) -> None:
        """Begin the slot's round of every module that has none, and forget those long past."""
        node = self.node
        num_rounds = node.history.at(slot).run_config.rounds.num_rounds
        for module, held in list(node.log.held.items()):
            if slot >= 0 and self._attended.get(module) != slot and held.version < num_rounds:
                self._attended[module] = slot
                self.background.start(self.rounds.attend(module, slot), f"round of {module}")
        self.member.contributions.forget_before(slot, kept=self.member.bound_blobs())

    async def _do_duties(self) -> None:
        """Every slot: see who is there, keep what falls to us, catch up where we fell behind."""
        round_seconds = self.node.history.first.run_config.rounds.round_seconds
        while True:
            await guarded(self._do_duties_once(), "duties", self.node.events)
            await guarded(
                self.node.offload(self._housekeeping.sweep), "housekeeping", self.node.events
            )
            await asyncio.sleep(min(round_seconds, DUTY_SECONDS_MAX))

    async def _do_duties_once(self) -> None:
        node = self.node
        snapshot = await self.look_around()
        training, topology = snapshot.training, node.manifest.topology
        trained = {peer: set(topology.modules_of(path)) for peer, path in training.items()}
        duties = {
            module
            for module in topology.modules
            if self._keeps(module_name(module), [p for p in trained if module not in trained[p]])
        }
        duties = self._affordable(duties)
        # What cannot be had now must not keep the others from being followed.
        await guarded(
            self.hold(sorted(duties - set(node.log.held))), "modules to keep", self.node.events
        )
        for module in sorted(node.log.held):
            # Looked up anew each time: a path may be taken while this waits.
            if module in duties or module in self._own:
                self._stay(module)
                refreshing = self.catch_up.refresh(module)
                await guarded(refreshing, f"catch-up of {module}", node.events)
            else:
                await self._retire(module)
        # The next versions' data too, so that it is there when they come into force.
        manifests = node.history.since(node.slot)
        wanted = [ref.digest for each in manifests for ref in self._wanted(each, snapshot)]
        # What is here is announced before anything is waited for.
        await self.providers.announce([node.run, *(d for d in wanted if d in node.store)])
        for manifest in manifests:
            for ref in self._wanted(manifest, snapshot):  # as far as there is room by now
                await guarded(
                    self.providers.obtain(ref), f"blob {ref.digest[:12]}", self.node.events
                )

    def _affordable(self, duties: set[ModuleID]) -> set[ModuleID]:
        """The duties that the disk limit has room for, held ones first; own modules are none."""
        node = self.node
        order = sorted(duties - self._own, key=lambda m: (m not in node.log.held, m))
        run = node.manifest.run_config
        costs = [(m, duty_module_bytes(run, node.log.num_parameters(m))) for m in order]
        taken = set(affordable(costs, self._duty_bytes))
        declined = sorted(str(module) for module in set(order) - taken)
        if declined != self._declined:
            self._declined = declined
            node.events.write("duties declined", modules=declined, room_bytes=self._duty_bytes)
        return taken | (duties & self._own)

    def _wanted(self, manifest: Manifest, snapshot: Snapshot) -> list[BlobRef]:
        """What this peer should have of a version's blobs: for itself, and for others."""
        wanted = [manifest.tokenizer, manifest.router]
        own = self._own_shard
        if own is not None and manifest is not self.node.manifest:
            # What was trained on its shards does not count for those of the next version.
            later = replace(snapshot, shard_tokens=manifest.shard_tokens, tokens={})
            own = assign_paths(later).get(self.node.peer_id, own)
        for path in manifest.topology.paths:
            others = [peer for peer, theirs in snapshot.training.items() if theirs != path]
            ref = manifest.shard(path).blob
            if path == own or (self._keeps(shard_name(path), others) and self._has_room(ref)):
                wanted.append(ref)
        router_data = manifest.router_data if manifest.phase_round is not None else None
        if router_data is not None and (self._own_shard is not None or self._keep_all):
            wanted.append(router_data)
        # Who holds the module that another one is born from has that state, or had it lately.
        held = {str(module) for module in self.node.log.held}
        wanted += [birth.state for birth in manifest.births if birth.source in held]
        return list(dict.fromkeys(wanted))

    async def _retire(self, module: ModuleID) -> None:
        """Give up a duty: first leave the next roster, then, when others hold it, the module."""
        node = self.node
        if module not in self._retiring:
            self._retiring[module] = node.slot
            self.member.retiring.add(module)
            await self.presence.publish_head(module)
        is_due = node.slot - self._retiring.get(module, node.slot) > RETIRE_SLOTS
        if is_due and not self._has_seat(module) and await self._is_held_by_others(module):
            await self.presence.withdraw_head(module)
            if module not in self._retiring:  # it is wanted again
                await self.presence.publish_head(module)
                return
            node.log.drop(module)
            node.events.write("dropped", module=str(module))
            self._stay(module)

    async def _is_held_by_others(self, module: ModuleID) -> bool:
        """Whether as many others as shall keep it hold our version of a module, or a later one."""
        held, num_keepers = self.node.log.held[module], self._num_keepers
        heads = await self.heads.read(module, max_age_seconds=0.0)
        others = {
            head.peer
            for head in heads
            if head.version >= held.version and not head.leaving and head.peer != self.node.peer_id
        }
        return len(others) >= max(1, num_keepers)

    def _has_seat(self, module: ModuleID) -> bool:
        """Whether the next version's quorum may need us."""
        certificate = self.node.log.held[module].certificate
        if certificate is None or may_rebuild(certificate, self.node.slot):
            return False
        return any(seat.peer == self.node.peer_id for seat in certificate.proposal.next_roster)

    def _stay(self, module: ModuleID) -> None:
        """Forget that a module was being given up."""
        self._retiring.pop(module, None)
        self.member.retiring.discard(module)

    def _keeps(self, what: str, peers: list[str]) -> bool:
        """Whether `what` falls to this peer, out of the `peers` that do not train it."""
        return self._keep_all or keeps(
            self.node.peer_id, what, peers=peers, num_keepers=self._num_keepers
        )

    @property
    def _num_keepers(self) -> int:
        return self.node.manifest.run_config.rounds.num_keepers

    async def _renew(self) -> None:
        while True:
            await guarded(self.presence.publish(), "presence", self.node.events)
            await asyncio.sleep(self.presence.renew_seconds)

    async def _leave(self) -> None:
        """Withdraw what we said, so that nobody waits for us; bounded: the network may be gone."""
        try:
            async with asyncio.timeout(5.0):
                await self.presence.withdraw()
                await self.providers.withdraw()
        except (SwarmError, TimeoutError):
            pass  # the records expire by themselves
        await self.member.close()
        await self.node.blobs.close()

    def _has_room(self, ref: BlobRef) -> bool:
        """Whether a blob may be kept for others: it is here, or leaves enough for our own path."""
        store = self.node.store
        if store.limit_bytes is None or self._duty_bytes is None or ref.digest in store:
            return True
        own_bytes = store.limit_bytes - self._duty_bytes
        return store.used_bytes + ref.num_bytes + own_bytes // 2 <= store.limit_bytes
