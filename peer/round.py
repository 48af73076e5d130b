"""A module's round, from the end of a slot to the version that it brings: whose turn is when.

Attempt k of a slot is led by the k-th peer of the roster in an order that a hash gives, so everyone
knows from the clock alone whose turn it is; a silent leader costs one attempt.
"""

import hashlib
from collections.abc import Sequence

from dipaco.topology import ModuleID
from peer.attempt import Attempt
from peer.certificate import may_rebuild, roster_of
from peer.committer import Committer
from peer.heads import Heads
from peer.member import FRESH_SECONDS, Member
from peer.merging import Merging
from peer.messages import MAX_ROSTER, MAX_WAIT_SECONDS, Ballot, Seat
from peer.modules import Held
from peer.node import Node

ATTEMPTS_PER_SLOT = 3  # each a quarter of a slot; the last quarter is left for pulling the result
COLLECT_SHARE = 0.3  # of an attempt: how long after the slot's end commitments are waited for
MERGE_SHARE = 0.4  # of an attempt: how long it may then take to merge some, in a crowded round
LOOK_SHARE = 0.1  # of the time left: how often it is looked at who is to be waited for
VOTE_SHARE = 0.3  # of an attempt: how long its leader has from then on, before another one begins


def leader_order(roster: Sequence[Seat], module: ModuleID, slot: int) -> list[str]:
    """Who leads attempt 0, 1, ... of `slot`: the roster by a hash that nobody chooses."""
    return sorted(
        (seat.peer for seat in roster),
        key=lambda peer: hashlib.sha256(f"{module}|{slot}|{peer}".encode()).digest(),
    )


class Rounds:
    """Runs the rounds of every module that this peer holds."""

    def __init__(self, node: Node, member: Member, heads: Heads, committer: Committer) -> None:
        self._node = node
        self._member = member
        self._heads = heads
        self._merging = Merging(node, member, committer)
        slot_seconds = node.history.first.run_config.rounds.round_seconds
        self._attempt_seconds = min(MAX_WAIT_SECONDS, slot_seconds / (ATTEMPTS_PER_SLOT + 1))

    async def attend(self, module: ModuleID, slot: int) -> None:
        """See one slot of one module through: lead when it is our turn, until it has a version."""
        node = self._node
        round_end = node.history.round_end(module, slot)
        until = round_end + COLLECT_SHARE * self._attempt_seconds
        await self._collect(module, slot, until=until)
        if (held := node.log.held.get(module)) is not None:
            until += MERGE_SHARE * self._attempt_seconds
            await self._merging.attend(held, slot, until=until)
        for attempt in range(ATTEMPTS_PER_SLOT):
            if await self._is_done_before(module, slot, attempt):
                return
            held = node.log.held[module]
            roster, rebuilt = await self._roster(held, slot, attempt)
            order = leader_order(roster, module, slot)
            if order and order[attempt % len(order)] == node.peer_id:
                await Attempt(
                    node=node,
                    member=self._member,
                    heads=self._heads,
                    held=held,
                    ballot=Ballot(slot=slot, attempt=attempt, leader=node.peer_id),
                    roster=roster,
                    rebuilt=rebuilt,
                    seconds=self._attempt_seconds,
                ).run()

    async def _is_done_before(self, module: ModuleID, slot: int, attempt: int) -> bool:
        """Wait until the slot has its certificate here, or it is time for an attempt.

        It is not while members pull, for a leader that is heard of, what they are to reduce.
        """
        node = self._node
        if attempt == 0:
            return await self._done(module, slot, until=node.now())
        begin = node.history.round_end(module, slot) + attempt * self._attempt_seconds

        def due() -> float:
            pulled = self._member.pulls_until(module, slot)
            return max(begin, pulled + VOTE_SHARE * self._attempt_seconds)

        while (until := due()) > node.now():
            if await self._done(module, slot, until=until):
                return True
        return await self._done(module, slot, until=node.now())

    async def _done(self, module: ModuleID, slot: int, *, until: float) -> bool:
        """Wait until the slot has its certificate here, or the time `until` has come."""

        def is_done() -> bool:
            held = self._node.log.held.get(module)
            return held is None or (
                held.certificate is not None and held.certificate.ballot.slot >= slot
            )

        left = max(0.0, until - self._node.now())
        return await self._member.changes.until(is_done, left)

    async def _collect(self, module: ModuleID, slot: int, *, until: float) -> None:
        """Wait until every trainer that is expected has committed, or until `until`."""
        log = self._node.log
        while module in log.held and (left := until - self._node.now()) > 0:
            expected = await self._expected(log.held[module], slot)
            if await self._member.changes.until(
                lambda expected=expected: (
                    bool(expected)  # type: ignore[misc]
                    and expected <= {c.peer for c in self._member.contributions.known(module, slot)}
                ),
                min(left, max(FRESH_SECONDS, LOOK_SHARE * left)),
            ):
                return

    async def _expected(self, held: Held, slot: int) -> set[str]:
        """Who will probably contribute: seated trainers, announced ones, and the last ones."""
        roster, _ = await self._roster(held, slot, 0)
        expected = {seat.peer for seat in roster if seat.path is not None}
        holders = self._heads.holders(held.module, held.version)
        expected |= {head.peer for head in holders if head.path is not None}
        if held.certificate is not None:
            expected.update(held.certificate.proposal.contributors)
        return expected

    async def _roster(self, held: Held, slot: int, attempt: int) -> tuple[tuple[Seat, ...], bool]:
        """The roster of an attempt, and whether it had to be made from the announcements.

        A certified roster comes first even when rebuilding is allowed: only it cannot fork.
        """
        certificate = held.certificate
        if certificate is not None and (attempt == 0 or not may_rebuild(certificate, slot)):
            return certificate.proposal.next_roster, False
        await self._heads.read(held.module, max_age_seconds=FRESH_SECONDS)
        return self._announced(held), True

    def _announced(self, held: Held) -> tuple[Seat, ...]:
        """A roster of those who announce our version; empty while that would be ourselves alone
        and we cannot be sure of it yet.
        """
        heads = self._heads.holders(held.module, held.version)
        roster = roster_of([Seat(peer=head.peer, path=head.path) for head in heads])[:MAX_ROSTER]
        if {seat.peer for seat in roster} <= {self._node.peer_id}:
            return roster if self._heads.is_alone(held.module, held.version) else ()
        return roster
