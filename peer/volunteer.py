"""A volunteer: a keeper that also trains a path, slot after slot of the common clock.

What is worked out from copies (encoding an outer gradient, preparing for a new version, evaluating
one, writing to the disk) goes on beside the inner steps, in other threads. What that leaves to the
time of training is in the event log of each slot.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dht.errors import LocalFault, NotYet, SwarmError, Unreachable
from dipaco.config import RunConfig
from dipaco.outer import warm_up
from dipaco.topology import ModuleID, PathID
from peer.archive import Link, shares
from peer.assignment import Snapshot, assign_paths, joining_order
from peer.beside import Beside
from peer.keeper import Keeper
from peer.modules import Held, counted_tokens
from peer.node import Offload
from peer.overdue import is_worth_a_notice, why_not_counted
from peer.path_source import Footing, PathSource, TrainerFactory
from peer.path_work import Draft, PathWork, Rebasing
from peer.scoring import Scoring
from peer.tally import Tally

BURST_SECONDS = 0.5  # of inner steps between two looks at the clock and at new versions
SCORING_SHARE = 0.5  # of a burst, after each burst while a phase of the routing is due
PLAN_SHARE = 0.75  # of a slot: when paths are chosen for the next one
LAST_LOOK_SHARE = 0.05  # of a slot: between two looks at whether other paths are finished, too
WAIT_SECONDS = 30.0  # and a slot at most, before what could not be had yet is tried again
MAX_PATHS_TRIED = 4  # whose modules cannot be had yet, before that: they have some in common
SETTLE_SECONDS = 1.0  # between two looks at who else is there, before the run starts

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How training is cut into bursts; tests under a virtual clock cut it by steps."""

    burst_seconds: float = BURST_SECONDS
    burst_steps: int = 1_000_000


class Volunteer:
    """Trains paths until the run is over or `stop` is set."""

    def __init__(
        self,
        keeper: Keeper,
        make_trainer: TrainerFactory,
        *,
        pace: Pace | None = None,
        train_in: Offload | None = None,
    ) -> None:
        """`train_in` runs the inner steps; without it, they run where everything else does."""
        self.keeper = keeper
        self.stop = asyncio.Event()
        self._node = keeper.node
        self._train_in = train_in or keeper.node.offload
        self._pace = pace or Pace()
        self._scoring = Scoring(keeper.node, keeper.presence)
        self._source = PathSource(keeper, make_trainer)
        self._snapshot = keeper.snapshot  # by which paths were chosen last
        self._plan: Mapping[str, PathID] = {}  # who trains what in the next slot
        self._work: PathWork | None = None
        self._footing: Footing | None = None
        self._step_seconds = 0.0  # how long an inner step takes, by the latest ones
        self._tally = Tally()
        self._evaluated_round = -1
        self._beside = Beside()
        self._rebasings: dict[ModuleID, asyncio.Task[Rebasing]] = {}
        self._counted_slot = -1  # the last slot in which something of ours was counted
        self._is_saved = True
        self._is_diverged = False  # in the last burst

    @property
    def _config(self) -> RunConfig:
        return self._node.manifest.run_config

    async def run(self) -> None:
        """Take a path and train it, changing it when the swarm needs another more."""
        await self._source.serve()
        await self._settle()
        outer = self._config.outer
        self.keeper.start(self._node.offload(lambda: warm_up(outer)), "compiler")
        slot, is_over = -1, False
        try:
            while not self.stop.is_set() and not (is_over := await self._is_run_over()):
                slot = next_slot(slot, self._node.slot)
                await self._train_slot(slot)
                await self._maybe_move()
                await self._follow_manifest()
            await self._pause_work()
        finally:
            self._beside.cancel()
            for task in self._rebasings.values():
                task.cancel()
        if is_over:
            self._node.events.write("finished", round=self._the_work().round)

    async def _is_run_over(self) -> bool:
        """Whether our path and all others have their rounds behind them.

        When only ours has, this looks on for the rest of the slot, while the others' versions
        come, and then moves to a path that still needs somebody.
        """
        if not self._is_finished():
            return False
        node = self._node
        look_seconds = LAST_LOOK_SHARE * self._config.rounds.round_seconds
        next_slot_time = node.history.first.slot_start(node.slot + 1)
        while not self.stop.is_set():
            try:
                snapshot = await self.keeper.presence.snapshot(node.manifest)
            except SwarmError:  # by what was seen last, then, until the swarm can be reached again
                snapshot = self._snapshot
            paths = [path for path in snapshot.open_paths if snapshot.fits(node.peer_id, path)]
            if snapshot.finished.issuperset(paths):
                return True
            left = next_slot_time - node.now()
            if left <= look_seconds:
                self._choose(snapshot)
                await self._pause(max(0.0, left))
                await self._maybe_move()
                break
            await self._pause(look_seconds)
        return False

    async def _settle(self) -> None:
        """Take a path; until the run starts, make room for others that took the same."""
        node = self._node
        await self.keeper.look_for_manifest()
        self._snapshot = await self.keeper.look_around()
        self._plan = self._snapshot.training
        await self._take_any(joining_order(node.peer_id, self._snapshot))
        if node.slot < 0:
            node.events.write("waiting", seconds=node.history.first.start_time - node.now())
        while node.slot < 0 and not self.stop.is_set():
            left = node.history.first.start_time - node.now()
            await self._pause(min(SETTLE_SECONDS, max(0.0, left)))
            self._choose(await self.keeper.look_around())
            await self._maybe_move()

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
                except SwarmError as error:
                    self._node.events.write("path not to be had", path=str(path), why=str(error))
                    num_later += isinstance(error, NotYet)
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
            await self._pause(seconds)

    async def _take(self, path: PathID) -> None:
        """Train this path from now on."""
        besides = () if self._work is None else self._work.trainer.modules
        work, footing = await self._source.take(path, besides=besides)
        await self._pause_work()
        self._work, self._footing = work, footing
        self.keeper.own(work.trainer.modules, path)
        self._find_place(under_way=self._under_way(path))
        self._evaluated_round = work.round
        self._counted_slot = max(-1, self._node.slot)
        self._node.events.write(
            "path",
            path=str(path),
            round=work.round,
            first_batch=work.trainer.next_batch_number,
            resumed=work.resumed,
            manifest=footing.manifest.version,
            shard_sequences=len(footing.shard.train),
        )
        self.keeper.start(self._source.take_over(work, self._snapshot.training), "handover")

    async def _follow_manifest(self) -> None:
        """Go on under the manifest in force now: by its settings, on the shard that it names."""
        node, work, footing = self._node, self._work, self._footing
        if work is None or footing is None or self.stop.is_set() or self._is_finished():
            return
        path = work.trainer.path
        self._footing = await self._source.footing_now(path, footing)
        if self._footing is footing:
            return
        await self._pause_work()
        await self._source.stand_on(work, self._footing)
        node.events.write(
            "manifest in force",
            version=self._footing.manifest.version,
            slot=node.slot,
            path=str(path),
            shard=self._footing.shard_digest,
        )

    def _find_place(self, *, under_way: int = 0) -> None:
        """Go on in the shard where the path's trainers, whoever they were, have got to."""
        node, work = self._node, self._the_work()
        path = work.trainer.path
        on_path = [peer for peer, theirs in self._plan.items() if theirs == path]
        peers = sorted({*on_path, node.peer_id})
        work.go_on_after(
            {
                module: counted_tokens(node.log.held[module].up_to(work.version(module)), path)
                for module in work.trainer.modules
            },
            rank=peers.index(node.peer_id),
            num_peers=len(peers),
            under_way=under_way,
        )

    def _under_way(self, path: PathID) -> int:
        """Tokens that others on `path` have probably trained, and no certificate counts yet."""
        snapshot, peer_id = self._snapshot, self._node.peer_id
        others = [peer for peer, theirs in snapshot.training.items() if theirs == path]
        return round(sum(snapshot.speed(peer) for peer in others if peer != peer_id))

    async def _train_slot(self, slot: int) -> None:
        """Inner steps through a slot, and one contribution per module when its round ends."""
        node, modules = self._node, self._the_work().trainer.modules
        tokens_before = self._tally.tokens
        steps = 0
        self._find_place()
        self.keeper.start(self._make_plan(slot), "path choice")
        ends = {module: node.history.round_end(module, slot) for module in modules}
        for end in sorted(set(ends.values())):
            steps = await self._train_until(end, slot, steps)
            if is_set_back(slot, node.slot):
                node.events.write("clock set back", slot=node.slot, was=slot)
                return
            if self.stop.is_set() or self._is_finished() or self._the_work().is_counted:
                continue
            # Whoever was suspended, or starved, has something for the last slot that is over.
            slot = max(slot, node.slot - 1)
            await self._offer(slot, [module for module in modules if ends[module] == end])
        if self.stop.is_set() or self._is_finished() or self._the_work().is_counted:
            return
        self.keeper.presence.progress.slot_tokens = self._tally.tokens - tokens_before
        await self._end_slot(slot)
        if self._config.rounds.blocking:
            await self._await_versions(slot)

    async def _train_until(self, end: float, slot: int, steps: int) -> int:
        """Inner steps until no other one fits before `end`; the slot's number of steps so far.

        The time that is left belongs to what follows: who is slow is not late.
        """
        node, rounds = self._node, self._config.rounds
        while (
            not self.stop.is_set()
            and node.now() < end - self._step_seconds * (steps > 0)
            and not is_set_back(slot, node.slot)
        ):
            self._beside.look()
            await self._apply_versions()
            self._save()
            if self._is_finished():
                break
            if rounds.blocking and not (self._the_work().is_counted or steps > 0):
                break  # an exact run takes no further step before the last ones are counted
            if rounds.blocking and steps >= rounds.inner_steps:
                break
            if await self._score() and rounds.blocking:
                continue  # an exact run scores with the versions as they were certified
            if steps == 0:
                node.events.write("training", slot=slot, path=str(self._the_work().trainer.path))
            room = rounds.inner_steps - steps if rounds.blocking else self._pace.burst_steps
            steps += await self._burst(min(room, self._pace.burst_steps), steps, end)
        if not self.stop.is_set():
            await self._apply_versions(wait=True)  # an outer gradient from an older one won't count
        return steps

    async def _make_plan(self, slot: int) -> None:
        """Late in a slot, when versions and announcements have come to rest, look who trains what.

        So all peers see the same, and compute the same assignment for the slot after.
        """
        node = self._node
        round_seconds = self._config.rounds.round_seconds
        look_time = node.history.first.slot_start(slot) + PLAN_SHARE * round_seconds
        await self._pause(max(0.0, look_time - node.now()))
        next_manifest = node.history.at(slot + 1)
        self._choose(await self.keeper.presence.snapshot(next_manifest))

    def _choose(self, snapshot: Snapshot) -> None:
        self._snapshot, self._plan = snapshot, assign_paths(snapshot)

    async def _score(self) -> bool:
        """Score some router data, if a phase is due; for less time than training has."""
        return await self._scoring.step(
            self._the_work(),
            seconds=SCORING_SHARE * self._pace.burst_seconds,
            max_batches=self._pace.burst_steps,
        )

    async def _burst(self, max_steps: int, first_step: int, end: float) -> int:
        work, node, loop = self._the_work(), self._node, asyncio.get_running_loop()
        seconds = max(0.0, min(self._pace.burst_seconds, end - node.now()))
        if self._tally.begin(node.now()):
            node.events.write("first step", path=str(work.trainer.path))
        before, begin_time, num_divergences = work.train_seconds, loop.time(), work.num_divergences
        steps = await self._train_in(
            lambda: work.train(seconds=seconds, max_steps=max_steps, first_step=first_step)
        )
        self._step_seconds = (loop.time() - begin_time) / steps
        if work.num_divergences > num_divergences:
            if not self._is_diverged:
                node.events.write("training diverged", path=str(work.trainer.path))
            self._is_diverged = True
            return steps
        self._is_diverged = False
        self._tally.trained(
            steps=steps,
            tokens=steps * work.trainer.tokens_per_step,
            seconds=work.train_seconds - before,
        )
        return steps

    async def _offer(self, slot: int, modules: Sequence[ModuleID]) -> None:
        """Take these modules' outer gradients; what is sent of them is worked out beside."""
        work = self._the_work()
        config = self._node.history.at(slot).run_config
        drafts = await self._instead("outer gradients", lambda: work.drafts(config, modules))
        self._beside.do(self._commit(drafts, work.trainer.path, slot))

    async def _commit(self, drafts: Sequence[Draft], path: PathID, slot: int) -> None:
        """Commit to outer gradients before anyone sees them."""
        offers = [await self._node.offload(draft.encode) for draft in drafts]
        commitments = await self.keeper.committer.prepare(offers, path=path, slot=slot)
        self.keeper.start(self.keeper.committer.commit(commitments), "commit")

    async def _end_slot(self, slot: int) -> None:
        """Say what was trained, and keep what the next start of an exact run needs."""
        node, work, tally = self._node, self._the_work(), self._tally
        node.events.write(
            "contributed",
            slot=slot,
            path=str(work.trainer.path),
            steps=tally.steps,
            tokens=tally.tokens,
            loss=work.last_loss,
            inner_share=round(tally.inner_share(node.now()), 4),
            seconds={what: round(seconds, 3) for what, seconds in tally.seconds.items()},
            sent_bytes=node.transport.traffic.wire_sent_bytes,
            received_bytes=node.transport.traffic.wire_received_bytes,
        )
        slots = slot - self._counted_slot
        if is_worth_a_notice(slots):
            held = [node.log.held[module] for module in work.trainer.modules]
            node.events.write("not counted", slots=slots, why=why_not_counted(held, slot))
        if self._config.rounds.blocking:
            await self._beside.finish()  # what is sent decides what is left for the next start
            await node.offload(work.save)
        else:
            self._is_saved = False

    def _save(self) -> None:
        """Once a slot, when what others wait for is done, keep what the next start needs."""
        if not self._is_saved and not self._beside:
            self._is_saved = True
            self._beside.do(self._node.offload(self._the_work().save))

    async def _instead(self, what: str, function: Callable[[], T]) -> T:
        """Do something in the time of inner steps, and note how long that took."""
        with self._tally.instead(what):
            return await self._node.offload(function)

    async def _pause_work(self) -> None:
        """Let everything beside come to its end, and keep what the next start needs."""
        for task in self._rebasings.values():
            task.cancel()
        self._rebasings.clear()
        await self._beside.finish()
        if self._work is not None:
            await self._node.offload(self._work.save)
            self._is_saved = True

    async def _await_versions(self, slot: int) -> None:
        """Exact runs: wait until every module of the path has its next version, or time is up.

        What was decided without us brings none: then our contribution is for the next slot.
        """
        node, work = self._node, self._the_work()
        modules = work.trainer.modules
        before = {module: work.version(module) for module in modules}
        deadline = node.history.first.slot_start(slot + 2)
        await self.keeper.versions.until(
            lambda: (
                self.stop.is_set()
                or all(
                    node.log.held[module].version > before[module]
                    or _is_decided(node.log.held[module], slot)
                    for module in modules
                )
            ),
            max(0.0, deadline - node.now()),
        )
        await self._apply_versions()
        if not self._is_finished():
            await self._pause(max(0.0, node.history.first.slot_start(slot + 1) - node.now()))

    async def _apply_versions(self, *, wait: bool = False) -> None:
        """Put every new version under the path; after a whole new round, evaluate and announce.

        One that is still being prepared for comes later, unless the caller can `wait`. What was
        prepared for a version that is not held any more, because there is a later one or it has
        lost a fork, is of no use.
        """
        node, work = self._node, self._the_work()
        for module in work.trainer.modules:
            while work.is_new(module, (held := node.log.held[module]).version, held.state):
                if module not in self._rebasings:
                    task = asyncio.ensure_future(self._prepare_rebasing(module))
                    self._rebasings[module] = task
                if not (wait or self._rebasings[module].done() or self._config.rounds.blocking):
                    break
                step = await self._rebasings.pop(module)
                if step.state == node.log.held[module].state:
                    await self._instead("new versions", partial(work.rebase, step))
                    if step.counted is not None:
                        self._counted_slot = node.slot
        if work.round > self._evaluated_round:
            self._evaluated_round = work.round
            self._beside.do(self._evaluate(work.round))

    async def _prepare_rebasing(self, module: ModuleID) -> Rebasing:
        node, work = self._node, self._the_work()
        held = node.log.held[module]
        counted = _counted_blob(held.after(work.version(module)), node.peer_id)
        state = await self._source.state(module)
        return await node.offload(
            lambda: work.rebasing(module, held.version, held.state, state, counted=counted)
        )

    async def _evaluate(self, round_number: int) -> None:
        node, work, tally = self._node, self._the_work(), self._tally
        progress = self.keeper.presence.progress
        evaluation = await node.offload(work.evaluate)
        if work is not self._work:
            return  # it has moved to another path meanwhile
        is_finite = math.isfinite(evaluation.nll_sum)  # else its modules have gone wrong
        progress.tokens = tally.tokens
        progress.commits = self._commits()
        progress.inner_share = tally.inner_share(node.now())
        progress.valid_nll = evaluation.nll_sum if is_finite else None
        progress.valid_tokens = evaluation.num_tokens if is_finite else 0
        node.events.write(
            "round",
            round=round_number,
            path=str(work.trainer.path),
            loss=work.last_loss,
            perplexity=evaluation.perplexity,
            steps=tally.steps,
            tokens=tally.tokens,
            inner_share=round(tally.inner_share(node.now()), 4),
            tokens_per_second=tally.tokens_per_second,
            sent_bytes=node.transport.traffic.wire_sent_bytes,
            received_bytes=node.transport.traffic.wire_received_bytes,
        )
        self.keeper.start(self.keeper.presence.announce(), "announcement")

    async def _maybe_move(self) -> None:
        """Change to the path that the common assignment gives us, if it is another one.

        If it is not to be had, the former one goes on; or any, if that is gone meanwhile.
        """
        node, work = self._node, self._work
        if work is None or self.stop.is_set():
            return
        path = self._plan.get(node.peer_id, work.trainer.path)
        if path != work.trainer.path:
            former = work.trainer.path
            try:
                await self._take(path)
                node.events.write("moved", path=str(path), former=str(former))
            except SwarmError as error:
                node.events.write("path not to be had", path=str(path), why=str(error))
                self.keeper.own(work.trainer.modules, former)
                if node.log.held.keys() >= set(work.trainer.modules):
                    await self.keeper.presence.change_path(former)
                else:
                    await self._take_any(joining_order(node.peer_id, self._snapshot))

    def _is_finished(self) -> bool:
        return self._work is not None and self._work.round >= self._config.rounds.num_rounds

    def _the_work(self) -> PathWork:
        assert self._work is not None, "a path is taken before anything is done on it"
        return self._work

    def _rarest_module(self) -> ModuleID:
        """The path's module with the fewest other paths."""
        topology = self._node.history.newest.topology
        return min(self._the_work().trainer.modules, key=topology.num_paths_through)

    def _commits(self) -> int:
        return sum(
            any(self._node.peer_id in share.peers for share in shares(certificate))
            for certificate in self._node.log.held[self._rarest_module()].chain
        )

    async def _pause(self, seconds: float) -> None:
        """Sleep, but wake up at once when asked to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass


def next_slot(last: int, current: int) -> int:
    """The slot to train in after `last`, now that it is `current`: none is trained in twice, unless
    the clock was ahead and has been set back.
    """
    return max(0, current) if is_set_back(last, current) else max(last + 1, current)


def is_set_back(slot: int, current: int) -> bool:
    """Whether the clock that `slot` is of was ahead: a slot is begun early, but by one at most.

    Before slot 0 there is nothing to go back to.
    """
    return slot > max(0, current) + 1


def _is_decided(held: Held, slot: int) -> bool:
    """Whether there is a certificate of `slot` or a later one."""
    return held.certificate is not None and held.certificate.ballot.slot >= slot


def _counted_blob(certificates: Sequence[Link], peer: str) -> str | None:
    """The last contribution of `peer` that these certificates contain."""
    for certificate in reversed(certificates):
        if any(peer in share.peers for share in shares(certificate)):
            parts = (p for c in certificate.proposal.contributions for p in c.parts)
            return next(part.blob for part in parts if part.peer == peer)
    return None
