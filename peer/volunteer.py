"""A volunteer: a keeper that also trains a path, and another one when the swarm needs that more."""

import asyncio
from collections.abc import Mapping, Sequence

from dht.errors import LocalFault, NotYet, Offline, SwarmError, Unreachable
from dipaco.config import RunConfig
from dipaco.outer import warm_up
from dipaco.topology import PathID
from peer.assignment import Snapshot, assign_paths, joining_order
from peer.changes import sleep_unless
from peer.keeper import Keeper
from peer.node import Offload
from peer.path_files import PATHS_KEPT
from peer.path_source import PathSource, TrainerFactory
from peer.scoring import Scoring
from peer.tally import Tally
from peer.training import Means, Pace, Training, is_set_back

PLAN_SHARE = 0.75  # of a slot: when paths are chosen for the next one
LAST_LOOK_SHARE = 0.05  # of a slot: between two looks at whether other paths are finished, too
WAIT_SECONDS = 30.0  # and a slot at most, before what could not be had yet is tried again
MAX_PATHS_TRIED = 4  # whose modules cannot be had yet, before that: they have some in common
MOMENT_SECONDS = 0.01  # at least, between two looks at whether a slot is over
SETTLE_SECONDS = 1.0  # between two looks at who else is there, before a path is trained


class Volunteer:
    """Trains paths until the run is over or `stop` is set."""

    def __init__(
        self,
        keeper: Keeper,
        make_trainer: TrainerFactory,
        *,
        pace: Pace | None = None,
        train_in: Offload | None = None,
        paths_kept: int = PATHS_KEPT,
    ) -> None:
        """`train_in` runs the inner steps; without it, they run where everything else does.

        `paths_kept`: of how many paths the optimizer's state stays on disk.
        """
        self.keeper = keeper
        self.stop = asyncio.Event()
        self._node = keeper.node
        self._source = PathSource(keeper, make_trainer, paths_kept=paths_kept)
        self._means = Means(
            keeper=keeper,
            source=self._source,
            train_in=train_in or keeper.node.offload,
            pace=pace or Pace(),
            scoring=Scoring(keeper.node, keeper.presence),
            tally=Tally(slot=max(-1, keeper.node.slot)),
            stop=self.stop,
        )
        self._snapshot = keeper.snapshot  # by which paths were chosen last
        self._plan: Mapping[str, PathID] = {}  # who trains what in the next slot
        self._training: Training | None = None

    @property
    def training(self) -> Training:
        """The training of the path that is taken; not to be asked for before one is."""
        assert self._training is not None, "a path is taken before anything is done on it"
        return self._training

    @property
    def _config(self) -> RunConfig:
        return self._node.manifest.run_config

    async def run(self) -> None:
        """Take a path and train it, changing it when the swarm needs another more."""
        await self._source.serve()
        await self._settle()
        outer = self._config.outer
        self.keeper.background.start(self._node.offload(lambda: warm_up(outer)), "compiler")
        slot, is_over = -1, False
        try:
            while not self.stop.is_set() and not (is_over := await self._is_run_over()):
                slot = next_slot(slot, self._node.slot)
                self.training.find_place(self._peers_on(self.training.path))
                self.keeper.background.start(self._make_plan(slot), "path choice")
                await self.training.train_slot(slot)
                await self._await_manifest(slot)
                await self._maybe_move()
                if not self.stop.is_set() and not self.training.is_finished:
                    await self.training.follow_manifest()
            if self._training is not None:
                await self._training.pause()
        finally:
            if self._training is not None:
                self._training.cancel()
        if is_over:
            self._node.events.write("finished", round=self.training.work.round)

    async def _is_run_over(self) -> bool:
        """Whether our path and all others have their rounds behind them.

        When only ours has, this looks on for the rest of the slot, while the others' versions
        come, and then moves to a path that still needs somebody.
        """
        if not self.training.is_finished:
            return False
        node = self._node
        look_seconds = LAST_LOOK_SHARE * self._config.rounds.round_seconds
        next_slot_time = node.history.first.slot_start(node.slot + 1)
        while not self.stop.is_set():
            try:
                snapshot = await self.keeper.survey.snapshot(node.manifest)
            except SwarmError:  # by what was seen last, then, until the swarm can be reached again
                snapshot = self._snapshot
            paths = [path for path in snapshot.open_paths if snapshot.fits(node.peer_id, path)]
            if snapshot.finished.issuperset(paths):
                return True
            left = next_slot_time - node.now()
            if left <= look_seconds:
                self._choose(snapshot)
                await sleep_unless(self.stop, max(0.0, left))
                await self._maybe_move()
                break
            await sleep_unless(self.stop, look_seconds)
        return False

    async def _settle(self) -> None:
        """Take a path; until the run starts, make room for others that took the same."""
        node = self._node
        self._snapshot = await self._first_look()
        self._plan = self._snapshot.training
        await self._take_any(joining_order(node.peer_id, self._snapshot))
        if node.slot < 0:
            node.events.write("waiting", seconds=node.history.first.start_time - node.now())
        while node.slot < 0 and not self.stop.is_set():
            left = node.history.first.start_time - node.now()
            await sleep_unless(self.stop, min(SETTLE_SECONDS, max(0.0, left)))
            try:
                snapshot = await self.keeper.look_around()
            except SwarmError:  # by what was seen last, then, until the swarm can be reached again
                continue
            self._choose(snapshot)
            await self._maybe_move()

    async def _first_look(self) -> Snapshot:
        """Who trains what under the newest manifest, once the swarm can be asked."""
        while not self.stop.is_set():
            try:
                await self.keeper.look_for_manifest()
                return await self.keeper.look_around()
            except Unreachable as error:
                self._node.events.write("error", where="first look", why=str(error))
                await sleep_unless(self.stop, SETTLE_SECONDS)
        return self.keeper.snapshot

    async def _take_any(self, paths: Sequence[PathID]) -> None:
        """Take the first of `paths` whose shard and modules can be had.

        Waits while that may change; each claim that is waited for has a limited number of tries.
        """
        if not paths:
            raise LocalFault(
                "no path of this run fits into the memory for training",
                hint="allow more memory, or use another device",
            )
        while not self.stop.is_set():
            num_later = 0
            for path in paths:
                try:
                    await self._take(path)
                except LocalFault:  # no other path would do better, and no peer is to blame
                    raise
                except SwarmError as error:
                    self._node.events.write("path not to be had", path=str(path), why=str(error))
                    num_later += isinstance(error, NotYet | Offline)
                else:
                    return
                if num_later == MAX_PATHS_TRIED:
                    break
            if not num_later:
                raise Unreachable(
                    "no path's shard and modules could be fetched",
                    hint="the peers that hold them may be gone; try again later or another address",
                )
            await self.keeper.presence.change_path(None)  # others need not count on us meanwhile
            seconds = min(WAIT_SECONDS, self._config.rounds.round_seconds)
            self._node.events.write("waiting for modules", seconds=seconds)
            await sleep_unless(self.stop, seconds)

    async def _take(self, path: PathID) -> None:
        """Train this path from now on."""
        former, node = self._training, self._node
        footing = await self._source.fetch(path, besides=former.modules if former else ())
        if former is not None:  # a device may have no room for two
            self._training = None
            await former.end()
        work = await self._source.begin(path, footing)
        self._training = training = Training(self._means, work, footing)
        self.keeper.own(training.modules, path)
        training.find_place(self._peers_on(path), under_way=self._under_way(path))
        node.events.write(
            "path",
            path=str(path),
            round=work.round,
            first_batch=work.trainer.next_batch_number,
            resumed=work.resumed,
            manifest=footing.manifest.version,
            shard_sequences=len(footing.shard.train),
        )
        self.keeper.background.start(
            self._source.take_over(work, self._snapshot.training), "handover"
        )

    def _peers_on(self, path: PathID) -> list[str]:
        """Who trains `path` by the plan."""
        return [peer for peer, theirs in self._plan.items() if theirs == path]

    def _under_way(self, path: PathID) -> int:
        """Tokens that others on `path` have probably trained, and no certificate counts yet."""
        snapshot, peer_id = self._snapshot, self._node.peer_id
        others = [peer for peer, theirs in snapshot.training.items() if theirs == path]
        return round(sum(snapshot.speed(peer) for peer in others if peer != peer_id))

    async def _await_manifest(self, slot: int) -> None:
        """Wait for the end of `slot`, if another manifest is in force in the next one.

        Inner steps end before a slot does, by the length of one; and what the next manifest has is
        not to be trained before its time.
        """
        node = self._node
        while node.slot == slot and node.history.at(slot + 1) is not node.manifest:
            left = node.history.first.slot_start(slot + 1) - node.now()
            await sleep_unless(self.stop, max(MOMENT_SECONDS, left))
            if self.stop.is_set():
                break

    async def _make_plan(self, slot: int) -> None:
        """Late in a slot, when versions and announcements have come to rest, look who trains what.

        So all peers see the same, and compute the same assignment for the slot after.
        """
        node = self._node
        round_seconds = self._config.rounds.round_seconds
        look_time = node.history.first.slot_start(slot) + PLAN_SHARE * round_seconds
        await sleep_unless(self.stop, max(0.0, look_time - node.now()))
        next_manifest = node.history.at(slot + 1)
        self._choose(await self.keeper.survey.snapshot(next_manifest))

    def _choose(self, snapshot: Snapshot) -> None:
        self._snapshot, self._plan = snapshot, assign_paths(snapshot)

    async def _maybe_move(self) -> None:
        """Change to the path that the common assignment gives us, if it is another one.

        If it is not to be had, the former one goes on; or any, if that is gone meanwhile.
        """
        if self.stop.is_set():
            return
        node, modules, former = self._node, self.training.modules, self.training.path
        path = self._plan.get(node.peer_id, former)
        if path == former:
            return
        try:
            await self._take(path)
        except (SwarmError, OSError) as error:
            node.events.write("path not to be had", path=str(path), why=str(error))
        else:
            node.events.write("moved", path=str(path), former=str(former))
            return
        self.keeper.own(modules, former)
        if self._training is not None and node.log.held.keys() >= set(modules):
            await self.keeper.presence.change_path(former)
        else:
            await self._take_any(joining_order(node.peer_id, self._snapshot))


def next_slot(last: int, current: int) -> int:
    """The slot to train in after `last`, now that it is `current`: none is trained in twice, unless
    the clock was ahead and has been set back.
    """
    return max(0, current) if is_set_back(last, current) else max(last + 1, current)
