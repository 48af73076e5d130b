"""What only the holder of the run's key can do: give a running swarm its next manifest.

The corpus is sharded anew when a discriminative phase is due and every path has been scored, and
when the run shall grow. The swarm does not wait for it, and trains on if the operator is away.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their name: N rows, P paths

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from bootstrap.gathering import Gathering
from bootstrap.growth import forget_growth, requested_growth
from dht.identity import Identity
from dipaco.checkpoint import state_bytes
from dipaco.config import RunConfig
from dipaco.errors import DipacoError
from dipaco.topology import PathID
from peer.boundary import guarded
from peer.keeper import Keeper
from peer.manifest import BlobRef, Manifest, Origin
from peer.messages import sign
from peer.node import Node
from peer.succession import ManifestDraft, grown, successor

NOTICE_SLOTS = 3  # from one that is signed until it is in force: everyone has heard of it by then
FURTHER_SLOTS = 1  # for more scores of the same paths, once every path has some
MISSING_SLOTS = 3  # in which scores may be missing without a word


class Corpus(Protocol):
    """The corpus, as the operator has it. Both take long, and run off the event loop."""

    def reshard(self, manifest: Manifest, scores_NP: Tensor) -> ManifestDraft:
        """Give each sequence to the path that probably predicts it best."""
        ...

    def grow(self, manifest: Manifest, config: RunConfig) -> ManifestDraft:
        """Give the sequences to the paths of `config`, which are more than the manifest's."""
        ...


class Operator:
    """Makes the next manifest whenever there is a reason for one."""

    def __init__(
        self, keeper: Keeper, corpus: Corpus, *, identity: Identity, directory: Path
    ) -> None:
        self._keeper = keeper
        self._node = keeper.node
        self._corpus = corpus
        self._identity = identity
        self._directory = directory
        self._gathering: Gathering | None = None
        self._missing: Sequence[PathID] = ()  # the paths without scores that were told of last
        self._due_slot = 0  # in which the phase at hand was found to be due
        self._complete_slot: int | None = None  # in which every path had scores

    async def run(self) -> None:
        """Look once per slot, until cancelled."""
        node = self._node
        while True:
            await guarded(self.look(), "operator", node.events)
            slot_end = node.history.first.slot_start(node.slot + 1)
            await asyncio.sleep(max(0.01, slot_end - node.now()))

    async def look(self) -> None:
        """Grow if that was asked for, else shard the corpus anew if a phase is due."""
        node, manifest = self._node, self._node.history.newest
        if node.slot < manifest.first_slot or not self._holds_all(manifest):
            return  # what is announced and held is still that of the version before
        levels = requested_growth(self._directory)
        if levels is not None:
            await self._grow(manifest, levels)
        elif manifest.phase_round is not None and all(
            held.version >= manifest.phase_round for held in node.log.held.values()
        ):
            await self._gather(manifest)

    def _holds_all(self, manifest: Manifest) -> bool:
        return set(manifest.topology.modules) <= set(self._node.log.held)

    async def _grow(self, manifest: Manifest, levels: tuple[int, ...]) -> None:
        node = self._node
        node.events.write("growing", levels=list(levels))
        try:
            config = grown(manifest.run_config, levels)
            draft = await node.offload(lambda: self._corpus.grow(manifest, config))
        except DipacoError as error:
            node.events.write("growth refused", levels=list(levels), why=str(error))
            forget_growth(self._directory, levels)
        else:
            if requested_growth(self._directory) != levels:
                return  # others were asked for meanwhile
            if await self._issue(manifest, draft):
                forget_growth(self._directory, levels)

    async def _gather(self, manifest: Manifest) -> None:
        """Collect the scores; shard the corpus anew once there are some of every path."""
        node = self._node
        if self._gathering is None or self._gathering.manifest is not manifest:
            self._gathering = await Gathering.begin(node, manifest)
            self._due_slot, self._complete_slot, self._missing = node.slot, None, ()
        await self._gathering.look()
        missing = self._gathering.missing
        if missing:
            if node.slot - self._due_slot >= MISSING_SLOTS and missing != self._missing:
                self._missing = missing
                node.events.write("scores missing", paths=[str(path) for path in missing[:20]])
            return
        if self._complete_slot is None:
            self._complete_slot = node.slot
        if node.slot - self._complete_slot < FURTHER_SLOTS:
            return
        scores_NP = self._gathering.scores()
        node.events.write("resharding", phase=manifest.num_phases + 1)
        draft = await node.offload(lambda: self._corpus.reshard(manifest, scores_NP))
        await self._issue(manifest, draft)

    async def _issue(self, manifest: Manifest, draft: ManifestDraft) -> bool:
        """Publish the draft as the version after `manifest`; False if that has one by now."""
        # Another copy of this directory may have signed one: two of a version divide the swarm.
        await self._keeper.look_for_manifest()
        if self._node.history.newest is not manifest:
            return False
        issue(self._node, draft, self._identity)
        await self._keeper.presence.point_to_manifest()
        return True


def issue(node: Node, draft: ManifestDraft, identity: Identity) -> Manifest:
    """Sign the next version of the manifest and take it up; what it names is in the store.

    It comes into force `NOTICE_SLOTS` from now. New modules are born from the versions held here.
    """
    history = node.history
    newest = {
        module: Origin(
            version=held.version,
            state=BlobRef(
                digest=held.state, num_bytes=state_bytes(node.log.num_parameters(module))
            ),
        )
        for module, held in node.log.held.items()
    }
    first_slot = max(0, node.slot, history.newest.first_slot) + NOTICE_SLOTS
    unsigned = successor(history.newest, draft, first_slot=first_slot, newest=newest)
    manifest = sign(unsigned, identity)
    history.add(manifest, sender=identity.peer_id)
    node.events.write(
        "issued",
        version=manifest.version,
        digest=manifest.digest,
        first_slot=first_slot,
        levels=list(manifest.topology.shape),
        num_phases=manifest.num_phases,
    )
    return manifest
