"""What a volunteer needs to train a path, from its peers: shard, modules, optimizer state."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from dht.errors import Unreachable
from dipaco.checkpoint import ModuleState
from dipaco.errors import DipacoError
from dipaco.inner import PathTrainer
from dipaco.shards import Shard
from dipaco.topology import ModuleID, PathID
from peer.handover import Handover, predecessors
from peer.keeper import Keeper
from peer.manifest import BlobRef, Manifest
from peer.path_work import PathWork
from peer.stored_shard import stored_shard

TrainerFactory = Callable[[Manifest, PathID, Shard], PathTrainer]
"""Makes the trainer of (manifest, path, shard) on this machine's device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footing:
    """What the work on a path was set up with."""

    manifest: Manifest
    shard: Shard
    shard_digest: str


class PathSource:
    """Brings paths to this machine."""

    def __init__(self, keeper: Keeper, make_trainer: TrainerFactory, *, paths_kept: int) -> None:
        self._keeper = keeper
        self._node = keeper.node
        self._make_trainer = make_trainer
        self._paths_dir = keeper.node.state_dir / "paths"
        self._paths_kept = paths_kept
        self._handover = Handover(keeper.node, self._paths_dir)

    async def serve(self) -> None:
        """Start handing the optimizer's states of this peer's paths to others."""
        await self._handover.serve()

    async def fetch(self, path: PathID, *, besides: Iterable[ModuleID] = ()) -> Footing:
        """Announce a path, and fetch what it needs.

        `besides`: the modules of the path that is trained until then. They are kept too, however
        long this takes, since that path goes on if it fails. Raises `Unreachable` if something is
        not to be had.
        """
        node, keeper = self._node, self._keeper
        manifest = node.manifest
        modules = manifest.topology.modules_of(path)
        ref = manifest.shard(path).blob
        await keeper.presence.change_path(path)
        await keeper.providers.obtain(ref)
        keeper.own([*besides, *modules], path)
        if not await keeper.hold(modules):
            raise Unreachable(f"a module of path {path} has no holder that answers")
        try:
            shard = await node.offload(lambda: self._read_shard(path, ref, manifest))
        except Unreachable:  # it had been here, rotted, and is gone now that this was found
            await keeper.providers.obtain(ref)
            shard = await node.offload(lambda: self._read_shard(path, ref, manifest))
        return Footing(manifest=manifest, shard=shard, shard_digest=ref.digest)

    async def begin(self, path: PathID, footing: Footing) -> PathWork:
        """Put the modules of a path that was fetched under a trainer, and announce them.

        Raises `Unreachable` if a state is damaged.
        """
        node = self._node
        make = partial(self._make_trainer, footing.manifest, path, footing.shard)
        work = await node.offload(
            lambda: PathWork(make(), self._paths_dir, paths_kept=self._paths_kept)
        )
        for module in work.trainer.modules:
            held = node.log.held[module]
            state = await self.state(module)
            work.begin(module, held.version, held.state, state)
            await self._keeper.presence.publish_head(module)
        return work

    async def take_over(self, work: PathWork, training: Mapping[str, PathID]) -> None:
        """Go on with the optimizer's state of who trained this path before, if it can be had."""
        if work.trainer.optimizer_name != "adamw":
            return
        # Nothing here stays with the trainer, which is let go when the path is left meanwhile.
        node, path, modules = self._node, work.trainer.path, work.trainer.modules
        peers = predecessors(
            path,
            [node.log.held[module] for module in modules],
            announced=training,
            peer=node.peer_id,
            slot=node.slot,
            has_own=work.resumed,
        )
        work.handed_over = await self._handover.take(
            path,
            peers,
            num_parameters=sum(map(node.log.num_parameters, modules)),
            config=work.trainer.config.inner,
        )

    async def footing_now(self, path: PathID, footing: Footing) -> Footing:
        """What work on `path` stands on under the manifest in force; `footing` itself if on that.

        A shard that is not here yet is not waited for: the old one serves for another slot.
        """
        node, manifest = self._node, self._node.manifest
        ref = manifest.shard(path).blob
        shard, shard_digest = footing.shard, footing.shard_digest
        if ref.digest != shard_digest:
            try:
                shard = await node.offload(lambda: self._read_shard(path, ref, manifest))
                shard_digest = ref.digest
            except Unreachable:
                self._keeper.background.start(
                    self._keeper.providers.obtain(ref), f"shard of {path}"
                )
        if manifest is footing.manifest and shard is footing.shard:
            return footing
        return Footing(manifest=manifest, shard=shard, shard_digest=shard_digest)

    async def stand_on(self, work: PathWork, footing: Footing) -> None:
        """Let `work` go on with another manifest's settings and shard."""
        make = partial(self._make_trainer, footing.manifest, work.trainer.path, footing.shard)
        await self._node.offload(lambda: work.change_trainer(make))

    async def state(self, module: ModuleID) -> ModuleState:
        """The state of a module's version that is held here; `Unreachable` if it cannot be read."""
        node = self._node
        try:
            return await node.offload(lambda: node.log.load_state(module))
        except DipacoError as error:
            raise Unreachable(str(error)) from error

    def _read_shard(self, path: PathID, ref: BlobRef, manifest: Manifest) -> Shard:
        shard = stored_shard(self._node.store, ref, manifest, path)
        if shard is None:
            raise Unreachable(f"the shard of path {path} is not on disk, or damaged")
        return shard
