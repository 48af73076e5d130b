"""The training of one path that is taken, slot after slot, until its peer moves to another one.

It drives `PathWork` by the common clock. What is worked out from copies (encoding an outer
gradient, preparing for a new version, evaluating one, writing to the disk) goes on beside the inner
steps, in other threads. What that leaves to the time of training is in the event log of each slot.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dipaco.config import RunConfig
from dipaco.topology import ModuleID
from peer.archive import shares
from peer.beside import Beside
from peer.changes import sleep_unless
from peer.draft import Draft
from peer.keeper import Keeper
from peer.modules import Held, counted_tokens
from peer.node import Offload
from peer.overdue import is_worth_a_notice, last_counted_slot, why_not_counted
from peer.path_source import Footing, PathSource
from peer.path_work import PathWork
from peer.rebaser import Rebaser
from peer.scoring import Scoring
from peer.tally import Tally

BURST_SECONDS = 0.5  # of inner steps between two looks at the clock and at new versions
SCORING_SHARE = 0.5  # of a burst, after each burst while a phase of the routing is due


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How training is cut into bursts; tests under a virtual clock cut it by steps."""

    burst_seconds: float = BURST_SECONDS
    burst_steps: int = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What stays the same from one path to the next."""

    keeper: Keeper
    source: PathSource
    train_in: Offload  # runs the inner steps
    pace: Pace
    scoring: Scoring
    tally: Tally
    stop: asyncio.Event  # once it is set, no other step is taken


class Training:
    """Trains a path, and has what was trained counted."""

    def __init__(self, means: Means, work: PathWork, footing: Footing) -> None:
        self.work = work
        self.path = work.trainer.path
        self.modules = work.trainer.modules
        self._footing = footing
        self._means = means
        self._keeper = means.keeper
        self._node = means.keeper.node
        self._tally = means.tally
        self._stop = means.stop
        self._beside = Beside()
        self._rebaser = Rebaser(self._node, means.source, work, means.tally)
        self._step_seconds = 0.0  # how long an inner step takes, by the latest ones
        # Who takes turns may have moved on before the next version of a path.
        self._evaluated_round = max(0, work.round - 1)
        self._committing: asyncio.Task[object] | None = None  # to the last outer gradients
        self._evaluating: asyncio.Task[object] | None = None  # the latest round
        self._saving: asyncio.Task[object] | None = None  # what the next start needs
        self._is_saved = True
        self._is_diverged = False  # in the last burst

    @property
    def is_finished(self) -> bool:
        """Whether the path has all its rounds behind it."""
        return self.work.round >= self._config.rounds.num_rounds

    def find_place(self, peers: Iterable[str], *, under_way: int = 0) -> None:
        """Go on in the shard where the path's trainers, whoever they were, have got to.

        `peers` train it now. `under_way`: tokens that others have trained, and no certificate
        counts yet.
        """
        node, work = self._node, self.work
        ranked = sorted({*peers, node.peer_id})
        work.go_on_after(
            {
                module: counted_tokens(node.log.held[module].up_to(work.version(module)), self.path)
                for module in self.modules
            },
            rank=ranked.index(node.peer_id),
            num_peers=len(ranked),
            under_way=under_way,
        )

    async def train_slot(self, slot: int) -> None:
        """Inner steps through a slot, and one contribution per module when its round ends."""
        node, modules = self._node, self.modules
        tokens_before = self._tally.tokens
        steps = 0
        ends = {module: node.history.round_end(module, slot) for module in modules}
        for end in sorted(set(ends.values())):
            steps = await self._train_until(end, slot, steps)
            if is_set_back(slot, node.slot):
                node.events.write("clock set back", slot=node.slot, was=slot)
                return
            if self._has_nothing_to_offer():
                continue
            await self._await_commitments()
            # Whoever was suspended, or starved, has something for the last slot that is over.
            slot = max(slot, node.slot - 1)
            await self._offer(slot, [module for module in modules if ends[module] == end])
        if self._has_nothing_to_offer():
            return
        self._keeper.presence.progress.slot_tokens = self._tally.tokens - tokens_before
        await self._end_slot(slot)
        if self._config.rounds.blocking:
            await self._await_versions(slot)

    async def follow_manifest(self) -> None:
        """Go on under the manifest in force now: by its settings, on the shard that it names."""
        node, source = self._node, self._means.source
        footing = await source.footing_now(self.path, self._footing)
        if footing is self._footing:
            return
        self._footing = footing
        await self.pause()
        await source.stand_on(self.work, footing)
        node.events.write(
            "manifest in force",
            version=footing.manifest.version,
            slot=node.slot,
            path=str(self.path),
            shard=footing.shard_digest,
        )

    async def pause(self) -> None:
        """Let everything beside come to its end, and keep what the next start needs."""
        self._rebaser.cancel()
        await self._beside.finish()
        self._is_saved = await self._keep(self.work.save, "optimizer")

    async def end(self) -> None:
        """Like `pause`, and for good: the device is free for another path."""
        await self.pause()
        self.work.let_go()

    def cancel(self) -> None:
        """Stop everything beside at its next wait."""
        self._beside.cancel()
        self._rebaser.cancel()

    @property
    def _config(self) -> RunConfig:
        return self._node.manifest.run_config

    def _has_nothing_to_offer(self) -> bool:
        return self._stop.is_set() or self.is_finished or self.work.is_counted

    async def _train_until(self, end: float, slot: int, steps: int) -> int:
        """Inner steps until no other one fits before `end`; the slot's number of steps so far.

        The time that is left belongs to what follows: who is slow is not late.
        """
        node, rounds, pace = self._node, self._config.rounds, self._means.pace
        while (
            not self._stop.is_set()
            and node.now() < end - self._step_seconds * (steps > 0)
            and not is_set_back(slot, node.slot)
        ):
            self._beside.look()
            await self._apply_versions()
            self._save()
            if self.is_finished:
                break
            if rounds.blocking and not (self.work.is_counted or steps > 0):
                break  # an exact run takes no further step before the last ones are counted
            if rounds.blocking and steps >= rounds.inner_steps:
                break
            if await self._score() and rounds.blocking:
                continue  # an exact run scores with the versions as they were certified
            if steps == 0:
                node.events.write("training", slot=slot, path=str(self.path))
            room = rounds.inner_steps - steps if rounds.blocking else pace.burst_steps
            steps += await self._burst(min(room, pace.burst_steps), steps, end)
        if not self._stop.is_set():
            await self._apply_versions(wait=True)  # an outer gradient from an older one won't count
        return steps

    async def _score(self) -> bool:
        """Score some router data, if a phase is due; for less time than training has."""
        pace = self._means.pace
        return await self._means.scoring.step(
            self.work,
            seconds=SCORING_SHARE * pace.burst_seconds,
            max_batches=pace.burst_steps,
        )

    async def _burst(self, max_steps: int, first_step: int, end: float) -> int:
        work, node, loop = self.work, self._node, asyncio.get_running_loop()
        seconds = max(0.0, min(self._means.pace.burst_seconds, end - node.now()))
        if self._tally.begin(node.now()):
            node.events.write("first step", path=str(self.path))
        before, begin_time, num_divergences = work.train_seconds, loop.time(), work.num_divergences
        steps = await self._means.train_in(
            lambda: work.train(seconds=seconds, max_steps=max_steps, first_step=first_step)
        )
        self._step_seconds = (loop.time() - begin_time) / steps
        if work.num_divergences > num_divergences:
            if not self._is_diverged:
                node.events.write("training diverged", path=str(self.path))
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
        config = self._node.history.at(slot).run_config
        with self._tally.instead("outer gradients"):
            drafts = await self._node.offload(lambda: self.work.drafts(config, modules))
        self._committing = self._beside.do(self._commit(drafts, slot))

    async def _await_commitments(self) -> None:
        """Where encoding takes longer than a slot, what is to be encoded next waits.

        Each outer gradient holds a copy of its module, and is known by its blob later.
        """
        if self._committing is not None:
            with self._tally.instead("outer gradients"):
                await asyncio.wait({self._committing})

    async def _commit(self, drafts: Sequence[Draft], slot: int) -> None:
        """Commit to outer gradients before anyone sees them."""
        committer = self._keeper.committer
        offers = [await self._node.offload(draft.encode) for draft in drafts]
        commitments = await committer.prepare(offers, path=self.path, slot=slot)
        self._keeper.background.start(committer.commit(commitments), "commit")

    async def _end_slot(self, slot: int) -> None:
        """Say what was trained, and keep what the next start of an exact run needs."""
        node, work, tally = self._node, self.work, self._tally
        node.events.write(
            "contributed",
            slot=slot,
            path=str(self.path),
            steps=tally.steps,
            tokens=tally.tokens,
            loss=work.last_loss,
            inner_share=round(tally.inner_share(node.now()), 4),
            seconds={what: round(seconds, 3) for what, seconds in tally.seconds.items()},
            sent_bytes=node.transport.traffic.wire_sent_bytes,
            received_bytes=node.transport.traffic.wire_received_bytes,
        )
        # Of modules of former paths, too: who takes turns has moved on when they are counted.
        counted_slot = last_counted_slot(node.log.held.values(), node.peer_id)
        tally.counted_slot = max(tally.counted_slot, counted_slot)
        slots = slot - 1 - tally.counted_slot
        if is_worth_a_notice(slots):
            held = [node.log.held[module] for module in self.modules]
            node.events.write("not counted", slots=slots, why=why_not_counted(held, slot))
        if self._config.rounds.blocking:
            await self._beside.finish()  # what is sent decides what is left for the next start
            await self._keep(work.save, "optimizer")
        else:
            self._is_saved = False

    def _save(self) -> None:
        """Once a slot, when what others wait for is done, keep what the next start needs."""
        if not self._is_saved and _is_over(self._committing) and _is_over(self._saving):
            self._is_saved = True
            self._saving = self._beside.do(self._keep(self.work.save, "optimizer"))

    async def _keep(self, write: Callable[[], object], what: str) -> bool:
        """Write what only a later start needs; False, and no more, if the disk does not take it.

        What is there from before stays until the next time. An exact run goes on, too: in memory it
        is exact still, which a start from what is there would not be.
        """
        try:
            await self._node.offload(write)
        except OSError as error:
            self._node.events.write("error", where=what, why=str(error))
            return False
        return True

    async def _await_versions(self, slot: int) -> None:
        """Exact runs: wait until every module of the path has its next version, or time is up.

        What was decided without us brings none: then our contribution is for the next slot. A
        module that is finished has none.
        """
        node = self._node
        num_rounds = node.history.at(slot).run_config.rounds.num_rounds
        versions = {module: self.work.version(module) for module in self.modules}
        before = {m: version for m, version in versions.items() if version < num_rounds}
        deadline = node.history.first.slot_start(slot + 2)
        await self._keeper.versions.until(
            lambda: (
                self._stop.is_set()
                or all(
                    node.log.held[module].version > version
                    or _is_decided(node.log.held[module], slot)
                    for module, version in before.items()
                )
            ),
            max(0.0, deadline - node.now()),
        )
        await self._apply_versions()
        if not self.is_finished:
            left = node.history.first.slot_start(slot + 1) - node.now()
            await sleep_unless(self._stop, max(0.0, left))

    async def _apply_versions(self, *, wait: bool = False) -> None:
        """Put every new version under the path; after a whole new round, evaluate and announce."""
        await self._rebaser.apply(wait=wait or self._config.rounds.blocking)
        if self.work.round > self._evaluated_round and _is_over(self._evaluating):
            self._evaluating = self._beside.do(self._evaluate())

    async def _evaluate(self) -> None:
        """Evaluate the latest round; where that takes longer than a round, some are passed over."""
        while (round_number := self.work.round) > self._evaluated_round:
            self._evaluated_round = round_number
            await self._evaluate_round(round_number)

    async def _evaluate_round(self, round_number: int) -> None:
        node, work, tally, presence = self._node, self.work, self._tally, self._keeper.presence
        evaluation, keep_if_best = await node.offload(work.evaluate)
        await self._keep(keep_if_best, "path at its best")
        is_finite = math.isfinite(evaluation.nll_sum)  # else its modules have gone wrong
        progress = presence.progress
        progress.tokens = tally.tokens
        progress.commits = self._commits()
        progress.inner_share = tally.inner_share(node.now())
        if presence.path == self.path:  # else a move is under way, and another path announced
            progress.valid_nll = evaluation.nll_sum if is_finite else None
            progress.valid_tokens = evaluation.num_tokens if is_finite else 0
        node.events.write(
            "round",
            round=round_number,
            path=str(self.path),
            loss=work.last_loss,
            perplexity=evaluation.perplexity,
            steps=tally.steps,
            tokens=tally.tokens,
            inner_share=round(tally.inner_share(node.now()), 4),
            tokens_per_second=tally.tokens_per_second,
            sent_bytes=node.transport.traffic.wire_sent_bytes,
            received_bytes=node.transport.traffic.wire_received_bytes,
        )
        self._keeper.background.start(presence.announce(), "announcement")

    def _rarest_module(self) -> ModuleID:
        """The path's module with the fewest other paths."""
        topology = self._node.history.newest.topology
        return min(self.modules, key=topology.num_paths_through)

    def _commits(self) -> int:
        return sum(
            any(self._node.peer_id in share.peers for share in shares(certificate))
            for certificate in self._node.log.held[self._rarest_module()].chain
        )


def _is_over(task: asyncio.Task[object] | None) -> bool:
    return task is None or task.done()


def is_set_back(slot: int, current: int) -> bool:
    """Whether the clock that `slot` is of was ahead: a slot is begun early, but by one at most.

    Before slot 0 there is nothing to go back to.
    """
    return slot > max(0, current) + 1


def _is_decided(held: Held, slot: int) -> bool:
    """Whether there is a certificate of `slot` or a later one."""
    return held.certificate is not None and held.certificate.ballot.slot >= slot
