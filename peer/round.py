"""A module's round seen by whoever may lead it: collect, ask, propose, certify.

Attempt k of a slot is led by the k-th peer of the roster in an order that a hash gives, so everyone
knows from the clock alone whose turn it is; a silent leader costs one attempt. The leader only
orders: what the new version is follows from the contributions, and each member computes it itself.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dht.errors import BadMessage, SwarmError
from dipaco.topology import ModuleID
from peer.certificate import (
    check_certificate,
    check_link,
    check_proposal,
    check_succession,
    counted,
    may_rebuild,
    quorum_votes,
    roster_of,
)
from peer.committer import Committer
from peer.courier import MESSAGE_TIMEOUT_SECONDS, Kind
from peer.heads import Heads
from peer.member import (
    FRESH_SECONDS,
    PULL_SHARE,
    Member,
)
from peer.merging import Merging
from peer.messages import (
    MAX_COUNTED,
    MAX_REASON_CHARACTERS,
    MAX_ROSTER,
    MAX_WAIT_SECONDS,
    Ballot,
    Certificate,
    CertifyRequest,
    Commitment,
    Done,
    HaveReply,
    HaveRequest,
    Proposal,
    ProposeReply,
    ProposeRequest,
    Seat,
    Vote,
)
from peer.modules import Held
from peer.node import Node

ATTEMPTS_PER_SLOT = 3  # each a quarter of a slot; the last quarter is left for pulling the result
COLLECT_SHARE = 0.3  # of an attempt: how long after the slot's end commitments are waited for
MERGE_SHARE = 0.4  # of an attempt: how long it may then take to merge some, in a crowded round
HAVE_SHARE = 0.4  # of an attempt: how long members may take to pull what they miss
EXACT_ATTEMPTS = 2  # of an exact run, in which a contribution that is late is waited for
MAX_BEHIND = 2  # versions, by its head, that somebody new in a roster may be: heads are rumours
PULL_SLACK = 2.0  # times what the bytes should take: lines are shared with others
ANSWER_SHARE = 0.2  # of an attempt: how long they may take to answer beyond that
VOTE_SHARE = 0.3  # of an attempt: how long its leader has from then on, before another one begins


def leader_order(roster: Sequence[Seat], module: ModuleID, slot: int) -> list[str]:
    """Who leads attempt 0, 1, ... of `slot`: the roster by a hash that nobody chooses."""
    return sorted(
        (seat.peer for seat in roster),
        key=lambda peer: hashlib.sha256(f"{module}|{slot}|{peer}".encode()).digest(),
    )


def agreed_contributions(
    commitments: Iterable[Commitment], held: Sequence[Sequence[str]], quorum: int
) -> tuple[Commitment, ...]:
    """The commitments to count of those whose bytes at least `quorum` members hold.

    `held`: per member, the digests of the commitments that it holds.
    """
    holders = Counter(digest for digests in held for digest in set(digests))
    return tuple(counted((c for c in commitments if holders[c.digest] >= quorum), MAX_COUNTED))


def pull_seconds(
    num_bytes: Mapping[str, int], rates: Mapping[str, float], *, limit_seconds: float
) -> float:
    """How long to wait for so many bytes of each peer; 0 if no bandwidth (bytes/s) is known.

    All of them have to come through a member's own line, for which the best rate stands, and each
    through the slower one of its sender, at the same time. A line that would take longer than
    `limit_seconds` is not waited for.
    """
    if not rates:
        return 0.0
    own_seconds = sum(num_bytes.values()) / max(rates.values())
    senders = [num_bytes[peer] / rate for peer, rate in rates.items()]
    seconds = max([own_seconds, *(s for s in senders if s <= limit_seconds)])
    return min(limit_seconds, PULL_SLACK * seconds)


class Rounds:
    """Runs the rounds of every module that this peer holds."""

    def __init__(self, node: Node, member: Member, heads: Heads, committer: Committer) -> None:
        self._node = node
        self._member = member
        self._heads = heads
        self._merging = Merging(node, member, committer)
        self._slot_seconds = node.history.first.run_config.rounds.round_seconds
        self.attempt_seconds = min(MAX_WAIT_SECONDS, self._slot_seconds / (ATTEMPTS_PER_SLOT + 1))

    async def attend(self, module: ModuleID, slot: int) -> None:
        """See one slot of one module through: lead when it is our turn, until it has a version."""
        node = self._node
        round_end = node.history.round_end(module, slot)
        until = round_end + COLLECT_SHARE * self.attempt_seconds
        await self._collect(module, slot, until=until)
        if (held := node.log.held.get(module)) is not None:
            until += MERGE_SHARE * self.attempt_seconds
            await self._merging.attend(held, slot, until=until)
        for attempt in range(ATTEMPTS_PER_SLOT):
            if await self._is_done_before(module, slot, attempt):
                return
            held = node.log.held[module]
            roster, rebuilt = await self._roster(held, slot, attempt)
            order = leader_order(roster, module, slot)
            if order and order[attempt % len(order)] == node.peer_id:
                ballot = Ballot(slot=slot, attempt=attempt, leader=node.peer_id)
                await self._lead(held, ballot, roster, rebuilt=rebuilt)

    async def _is_done_before(self, module: ModuleID, slot: int, attempt: int) -> bool:
        """Wait until the slot has its certificate here, or it is time for an attempt.

        It is not while members pull, for a leader that is heard of, what they are to reduce.
        """
        node = self._node
        if attempt == 0:
            return await self._done(module, slot, until=node.now())
        begin = node.history.round_end(module, slot) + attempt * self.attempt_seconds

        def due() -> float:
            pulled = self._member.pulls_until(module, slot)
            return max(begin, pulled + VOTE_SHARE * self.attempt_seconds)

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
                min(left, FRESH_SECONDS),
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

    async def _lead(
        self, held: Held, ballot: Ballot, roster: tuple[Seat, ...], *, rebuilt: bool
    ) -> None:
        """One attempt, from asking what members hold to handing out the certificate."""
        known = self._member.contributions.known(held.module, ballot.slot)
        if not known:
            return
        replies = await self._ask_until_held(held, ballot, roster, known)
        for peer, reply in replies.items():
            done = reply.certificate
            if done is not None and await self._member.learn(done, sender=peer):
                return
        promises = {peer: reply for peer, reply in replies.items() if reply.promised}
        quorum = len(roster) // 2 + 1
        if len(promises) < quorum:
            self._failed(held, ballot, f"{len(promises)} of {len(roster)} members promised")
            return
        proposal = _locked(promises.values(), roster) or await self._propose(
            held, ballot.slot, roster, promises, rebuilt=rebuilt
        )
        if proposal is None:
            self._failed(held, ballot, "no contribution is held by a quorum")
            return
        missing = self._missing(proposal, promises)
        if missing and ballot.attempt < EXACT_ATTEMPTS:
            self._failed(held, ballot, f"an exact run, and nothing from {', '.join(missing)}")
            return
        certificate = await self._gather_votes(held, proposal, ballot)
        if certificate is not None:
            await self._member.learn(certificate, sender=self._node.peer_id)
            await self._hand_out(certificate)

    async def _ask_until_held(
        self, held: Held, ballot: Ballot, roster: tuple[Seat, ...], known: Sequence[Commitment]
    ) -> dict[str, HaveReply]:
        """Who of the roster promises the ballot, and holds what.

        Who does not answer in time is not waited for. Who does and still pulls (it has used up its
        time) is asked again, for as long as the bytes should take by what this peer has measured.
        """
        wanted = tuple(counted(known, MAX_COUNTED))
        digests = {commitment.digest for commitment in wanted}
        end = self._node.history.round_end(held.module, ballot.slot) + self._pull_seconds(wanted)
        peers = [seat.peer for seat in roster]
        replies: dict[str, HaveReply] = {}
        while peers:
            begin = self._node.now()
            replies |= await self._ask_have(held, ballot, peers, wanted)
            now = self._node.now()
            nobody_pulls = now - begin < HAVE_SHARE * self.attempt_seconds
            if now >= end or nobody_pulls or any(r.certificate for r in replies.values()):
                break
            peers = [p for p, r in replies.items() if r.promised and not digests <= set(r.held)]
        return replies

    def _pull_seconds(self, commitments: Sequence[Commitment]) -> float:
        """How long after the slot's end members may go on pulling."""
        sources = self._node.blobs.sources
        rates = {c.peer: rate for c in commitments if (rate := sources.bytes_per_second(c.peer))}
        return pull_seconds(
            {c.peer: c.blob_bytes for c in commitments},
            rates,
            limit_seconds=PULL_SHARE * self._slot_seconds,
        )

    async def _ask_have(
        self, held: Held, ballot: Ballot, peers: Sequence[str], wanted: tuple[Commitment, ...]
    ) -> dict[str, HaveReply]:
        """One look at what these members hold.

        When all have committed before the round is over (in an exact run), there is all the rest of
        it for them to pull.
        """
        node = self._node
        left = node.history.round_end(held.module, ballot.slot) - node.now()
        wait = min(MAX_WAIT_SECONDS, max(left, HAVE_SHARE * self.attempt_seconds))
        window = wait + ANSWER_SHARE * self.attempt_seconds
        request = HaveRequest(
            run=node.run,
            module=str(held.module),
            version=held.version + 1,
            parent=held.parent,
            ballot=ballot,
            commitments=wanted,
            wait_seconds=wait,
        )
        others = {peer: request for peer in peers if peer != node.peer_id}
        asking = self._member.courier.ask_all(HaveReply, others, Kind.HAVE, window)
        if node.peer_id not in peers:
            return await self._credible(await asking, held, ballot)
        mine, replies = await asyncio.gather(
            self._member.have(request, sender=node.peer_id), asking
        )
        return {**await self._credible(replies, held, ballot), node.peer_id: mine}

    async def _credible(
        self, replies: Mapping[str, HaveReply], held: Held, ballot: Ballot
    ) -> dict[str, HaveReply]:
        """Without those of another history, and those that say what cannot be so."""
        credible = {}
        run, slot = self._node.run, self._node.slot
        for peer, reply in replies.items():
            done = reply.certificate
            try:
                if done is not None and done.proposal.parent != held.parent:
                    await self._member.learn(done, sender=peer)
                    continue
                check_have_reply(reply, held, ballot, run=run, slot=slot, sender=peer)
            except BadMessage as error:
                self._node.faults.count(error, peer)
            else:
                credible[peer] = reply
        return credible

    async def _propose(
        self,
        held: Held,
        slot: int,
        roster: tuple[Seat, ...],
        promises: dict[str, HaveReply],
        *,
        rebuilt: bool,
    ) -> Proposal | None:
        """What a quorum can reduce right away, and who forms the next round's roster.

        A member that did not answer loses its seat until it announces itself to a later leader: the
        majority that certifies this is a majority of the *old* roster, so shrinking is safe.
        """
        manifest = self._node.history.at(slot).digest
        known = {c.digest: c for reply in promises.values() for c in reply.commitments}
        usable = [
            c
            for c in known.values()
            if (c.base_state, c.manifest, c.slot) == (held.state, manifest, slot)
        ]
        contributions = agreed_contributions(
            usable, [reply.held for reply in promises.values()], len(roster) // 2 + 1
        )
        if not contributions:
            return None
        fresh = await self._heads.read(held.module, max_age_seconds=self._slot_seconds)
        heads = {
            head.peer: head
            for head in fresh
            if not head.leaving and head.version >= held.version - MAX_BEHIND
        }
        seated = {seat.peer: seat for seat in roster}
        staying = {peer for peer, reply in promises.items() if not reply.leaving}
        candidates = (staying or set(promises)) | (set(heads) - set(seated))
        next_roster = [
            Seat(peer=peer, path=heads[peer].path) if peer in heads else seated[peer]
            for peer in sorted(candidates)
        ]
        return Proposal(
            run=self._node.run,
            module=str(held.module),
            version=held.version + 1,
            parent=held.parent,
            contributions=contributions,
            roster=roster,
            rebuilt=rebuilt,
            next_roster=roster_of(next_roster)[:MAX_ROSTER],
        )

    def _missing(self, proposal: Proposal, promises: Mapping[str, HaveReply]) -> list[str]:
        """In an exact run: trainers that answer, and whose contribution is not in the proposal.

        One that committed to an older version has been overtaken, and has nothing to be waited for.
        """
        if not self._node.history.at(proposal.slot).run_config.rounds.blocking:
            return []
        trainers = {seat.peer for seat in proposal.next_roster if seat.path is not None}
        there = set(proposal.contributors)
        base = proposal.contributions[0].base_state
        known = [c for reply in promises.values() for c in reply.commitments]
        overtaken = {commitment.peer for commitment in known if commitment.base_state != base}
        return sorted((trainers & set(promises)) - there - overtaken)

    async def _gather_votes(
        self, held: Held, proposal: Proposal, ballot: Ballot
    ) -> Certificate | None:
        """Ask everyone to vote; return as soon as a quorum agrees, without the slow ones."""
        self._node.events.write(
            "proposing",
            module=proposal.module,
            version=proposal.version,
            slot=ballot.slot,
            attempt=ballot.attempt,
            proposal=proposal.digest,
            contributors=proposal.contributors,
        )
        request = ProposeRequest(ballot=ballot, proposal=proposal)
        own = self._own_vote(proposal, ballot)
        asked: list[asyncio.Future[ProposeReply | None]] = [asyncio.ensure_future(own)]
        asked += [
            asyncio.ensure_future(
                self._member.courier.ask_as(
                    ProposeReply, seat.peer, Kind.PROPOSE, request, self._slot_seconds
                )
            )
            for seat in proposal.roster
            if seat.peer != self._node.peer_id
        ]
        votes: list[Vote] = []
        refusals: list[str] = []
        try:
            for answer in asyncio.as_completed(asked):
                reply = await answer
                if reply is None or reply.vote is None:
                    refusals.append(reply.reason if reply is not None else "no answer")
                elif reply.vote.is_authentic and reply.vote.ballot == ballot:
                    votes.append(reply.vote)
                quorum = quorum_votes(proposal, votes)
                if quorum is not None:
                    return Certificate(
                        proposal=proposal, ballot=ballot, result=quorum[0].result, votes=quorum
                    )
        finally:
            for task in asked:
                task.cancel()
        self._failed(held, ballot, f"{len(votes)} votes; otherwise: {', '.join(refusals)}")
        return None

    async def _own_vote(self, proposal: Proposal, ballot: Ballot) -> ProposeReply:
        """What speaks against it here is one refusal, like that of any other member."""
        try:
            return await self._member.vote(proposal, ballot, sender=self._node.peer_id)
        except (SwarmError, ValueError) as error:
            return ProposeReply(reason=str(error)[:MAX_REASON_CHARACTERS])

    async def _hand_out(self, certificate: Certificate) -> None:
        proposal = certificate.proposal
        self._node.events.write(
            "publishing",
            module=proposal.module,
            version=proposal.version,
            slot=certificate.ballot.slot,
            attempt=certificate.ballot.attempt,
            certificate=certificate.digest,
        )
        peers = {seat.peer for seat in (*proposal.roster, *proposal.next_roster)}
        peers.update(proposal.contributors)
        request = CertifyRequest(certificate=certificate)
        others = dict.fromkeys(peers - {self._node.peer_id}, request)
        await self._member.courier.ask_all(Done, others, Kind.CERTIFY, MESSAGE_TIMEOUT_SECONDS)

    def _failed(self, held: Held, ballot: Ballot, why: str) -> None:
        self._node.events.write(
            "attempt failed",
            module=str(held.module),
            slot=ballot.slot,
            attempt=ballot.attempt,
            why=why,
        )


def check_have_reply(
    reply: HaveReply, held: Held, ballot: Ballot, *, run: str, slot: int, sender: str
) -> None:
    """Raise `BadMessage` if a certificate or proposal in it is not one of `held`'s next version.

    What it voted for is proposed again, so nothing but what everyone may vote for in `ballot`
    will do. `slot` is the clock's.
    """
    certificate, accepted = reply.certificate, reply.accepted
    proposals = [accepted] if accepted is not None else []
    proposals += [certificate.proposal] if certificate is not None else []
    for proposal in proposals:
        names = proposal.run, proposal.module, proposal.version, proposal.parent
        if names != (run, str(held.module), held.version + 1, held.parent):
            raise BadMessage(sender, f"speaks of another version than was asked of {held.module}")
    if certificate is not None:
        check_certificate(certificate, sender=sender)
        check_link(certificate, held.certificate, origin=held.origin, slot=slot, sender=sender)
    if accepted is not None:
        voted = reply.accepted_ballot
        if voted is None or (reply.promised and voted.order > ballot.order):
            raise BadMessage(sender, "a vote in no ballot, or in a later one than is promised")
        check_proposal(accepted, sender=sender)
        check_succession(
            accepted, held.certificate, origin=held.origin, slot=voted.slot, sender=sender
        )


def _locked(replies: Iterable[HaveReply], roster: tuple[Seat, ...]) -> Proposal | None:
    """What some member of this roster already voted for, in the latest ballot: it comes again."""
    accepted = [
        (reply.accepted_ballot.order, reply.accepted)
        for reply in replies
        if reply.accepted_ballot is not None
        and reply.accepted is not None
        and reply.accepted.roster == roster
    ]
    return max(accepted, key=lambda pair: pair[0])[1] if accepted else None
