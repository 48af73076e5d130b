"""One attempt at a module's next version, by its leader: ask, propose, gather votes, certify.

The leader only orders: what the new version is follows from the contributions, and each member
computes it itself.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from dht.errors import BadMessage, SwarmError
from peer.certificate import (
    check_certificate,
    check_link,
    check_proposal,
    check_succession,
    contribution_order,
    counted,
    quorum_votes,
    roster_of,
)
from peer.courier import MESSAGE_TIMEOUT_SECONDS, Kind
from peer.heads import Heads
from peer.member import PULL_SHARE, Member
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

HAVE_SHARE = 0.4  # of an attempt: how long members may take to pull what they miss
ANSWER_SHARE = 0.2  # of an attempt: how long they may take to answer beyond that
PULL_SLACK = 2.0  # times what the bytes should take: lines are shared with others
EXACT_ATTEMPTS = 2  # of an exact run, in which a contribution that is late is waited for
MAX_BEHIND = 2  # versions, by its head, that somebody new in a roster may be: heads are rumours


def agreed_contributions(
    commitments: Iterable[Commitment], held: Sequence[Sequence[str]], quorum: int
) -> tuple[Commitment, ...]:
    """The commitments to count of those whose bytes at least `quorum` members hold.

    `held`: per member, the digests of the commitments that it holds.
    """
    holders = Counter(digest for digests in held for digest in set(digests))
    return tuple(counted((c for c in commitments if holders[c.digest] >= quorum), MAX_COUNTED))


def wanted_contributions(
    commitments: Iterable[Commitment], seated: Set[str]
) -> tuple[Commitment, ...]:
    """The commitments whose bytes members are asked to pull: of `seated` peers first, then others.

    Keys cost nothing: many strangers, who claim many tokens and send nothing, would take the places
    of all who train.
    """
    theirs: dict[bool, list[Commitment]] = {True: [], False: []}
    for commitment in commitments:
        theirs[commitment.peer in seated].append(commitment)
    chosen = counted(theirs[True], MAX_COUNTED)
    chosen += counted(theirs[False], MAX_COUNTED - len(chosen))
    return tuple(sorted(chosen, key=contribution_order))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt that this peer leads."""

    node: Node
    member: Member
    heads: Heads
    held: Held  # the version that the next one is to follow
    ballot: Ballot
    roster: tuple[Seat, ...]
    rebuilt: bool  # the roster is not the certified one, but made from the announcements
    seconds: float  # that an attempt may take, before the next leader's begins

    @property
    def _quorum(self) -> int:
        return len(self.roster) // 2 + 1

    @property
    def _slot_seconds(self) -> float:
        return self.node.history.first.run_config.rounds.round_seconds

    async def run(self) -> None:
        """Ask what members hold, propose, and hand out the certificate if there is one."""
        known = self.member.contributions.known(self.held.module, self.ballot.slot)
        if not known:
            return
        replies = await self._ask_until_held(self._usable(known))
        for peer, reply in replies.items():
            done = reply.certificate
            if done is not None and await self._learn(done, sender=peer):
                return
        promises = {peer: reply for peer, reply in replies.items() if reply.promised}
        if len(promises) < self._quorum:
            self._failed(f"{len(promises)} of {len(self.roster)} members promised")
            return
        proposal = _locked(promises.values(), self.roster) or await self._propose(promises)
        if proposal is None:
            self._failed("no contribution is held by a quorum")
            return
        missing = self._missing(proposal, promises)
        if missing and self.ballot.attempt < EXACT_ATTEMPTS:
            self._failed(f"an exact run, and nothing from {', '.join(missing)}")
            return
        certificate = await self._gather_votes(proposal)
        if certificate is not None:
            await self._conclude(certificate)

    def _usable(self, commitments: Iterable[Commitment]) -> list[Commitment]:
        return self.member.contributions.usable(commitments, self.held, self.ballot.slot)

    async def _ask_until_held(self, known: Sequence[Commitment]) -> dict[str, HaveReply]:
        """Who of the roster promises the ballot, and holds what.

        Who does not answer in time is not waited for. Who does and still pulls (it has used up its
        time) is asked again, for as long as the bytes should take by what this peer has measured.
        """
        wanted = wanted_contributions(known, {seat.peer for seat in self.roster})
        digests = {commitment.digest for commitment in wanted}
        round_end = self.node.history.round_end(self.held.module, self.ballot.slot)
        end = round_end + self._pull_seconds(wanted)
        peers = [seat.peer for seat in self.roster]
        replies: dict[str, HaveReply] = {}
        while peers:
            begin = self.node.now()
            replies |= await self._ask_have(peers, wanted)
            now = self.node.now()
            nobody_pulls = now - begin < HAVE_SHARE * self.seconds
            if now >= end or nobody_pulls or any(r.certificate for r in replies.values()):
                break
            peers = [p for p, r in replies.items() if r.promised and not digests <= set(r.held)]
        return replies

    def _pull_seconds(self, commitments: Sequence[Commitment]) -> float:
        """How long after the slot's end members may go on pulling."""
        sources = self.node.blobs.sources
        rates = {c.peer: rate for c in commitments if (rate := sources.bytes_per_second(c.peer))}
        return pull_seconds(
            {c.peer: c.blob_bytes for c in commitments},
            rates,
            limit_seconds=PULL_SHARE * self._slot_seconds,
        )

    async def _ask_have(
        self, peers: Sequence[str], wanted: tuple[Commitment, ...]
    ) -> dict[str, HaveReply]:
        """One look at what these members hold.

        When all have committed before the round is over (in an exact run), there is all the rest of
        it for them to pull.
        """
        node = self.node
        left = node.history.round_end(self.held.module, self.ballot.slot) - node.now()
        wait = min(MAX_WAIT_SECONDS, max(left, HAVE_SHARE * self.seconds))
        window = wait + ANSWER_SHARE * self.seconds
        request = HaveRequest(
            run=node.run,
            module=str(self.held.module),
            version=self.held.version + 1,
            parent=self.held.parent,
            ballot=self.ballot,
            commitments=wanted,
            wait_seconds=wait,
        )
        others = {peer: request for peer in peers if peer != node.peer_id}
        asking = self.member.courier.ask_all(HaveReply, others, Kind.HAVE, window)
        if node.peer_id not in peers:
            return await self._credible(await asking)
        mine, replies = await asyncio.gather(self._own_have(request), asking)
        return {**await self._credible(replies), node.peer_id: mine}

    async def _own_have(self, request: HaveRequest) -> HaveReply:
        """Whoever is so late that its slot is over refuses itself, too, as others do."""
        try:
            return await self.member.have(request, sender=self.node.peer_id)
        except BadMessage:
            return HaveReply(promised=False, held=(), commitments=())

    async def _credible(self, replies: Mapping[str, HaveReply]) -> dict[str, HaveReply]:
        """Without those of another history, and those that say what cannot be so."""
        credible = {}
        run, slot = self.node.run, self.node.slot
        for peer, reply in replies.items():
            done = reply.certificate
            try:
                if done is not None and done.proposal.parent != self.held.parent:
                    await self._learn(done, sender=peer)
                    continue
                check_have_reply(reply, self.held, self.ballot, run=run, slot=slot, sender=peer)
            except BadMessage as error:
                self.node.faults.count(error, peer)
            else:
                credible[peer] = reply
        return credible

    async def _learn(self, certificate: Certificate, *, sender: str) -> bool:
        """Apply what a member says is certified already, if it is; a lie of it ends no attempt.

        It has proved nothing yet: to rebuild a roster, say, anyone can certify with itself alone.
        """
        proposal = certificate.proposal
        try:
            if (proposal.run, proposal.module) != (self.node.run, str(self.held.module)):
                raise BadMessage(sender, f"speaks of another module than {self.held.module}")
            return await self.member.learn(certificate, sender=sender)
        except BadMessage as error:
            self.node.faults.count(error, sender)
            return False

    async def _propose(self, promises: Mapping[str, HaveReply]) -> Proposal | None:
        """What a quorum can reduce right away, and who forms the next round's roster.

        A member that did not answer loses its seat until it announces itself to a later leader: the
        majority that certifies this is a majority of the *old* roster, so shrinking is safe.
        """
        held = self.held
        known = {c.digest: c for reply in promises.values() for c in reply.commitments}
        contributions = agreed_contributions(
            self._usable(known.values()),
            [reply.held for reply in promises.values()],
            self._quorum,
        )
        if not contributions:
            return None
        fresh = await self.heads.read(held.module, max_age_seconds=self._slot_seconds)
        heads = {
            head.peer: head
            for head in fresh
            if not head.leaving and head.version >= held.version - MAX_BEHIND
        }
        seated = {seat.peer: seat for seat in self.roster}
        staying = {peer for peer, reply in promises.items() if not reply.leaving}
        candidates = (staying or set(promises)) | (set(heads) - set(seated))
        next_roster = [
            Seat(peer=peer, path=heads[peer].path) if peer in heads else seated[peer]
            for peer in sorted(candidates)
        ]
        return Proposal(
            run=self.node.run,
            module=str(held.module),
            version=held.version + 1,
            parent=held.parent,
            contributions=contributions,
            roster=self.roster,
            rebuilt=self.rebuilt,
            next_roster=roster_of(next_roster)[:MAX_ROSTER],
        )

    def _missing(self, proposal: Proposal, promises: Mapping[str, HaveReply]) -> list[str]:
        """In an exact run: trainers that answer, and whose contribution is not in the proposal.

        One that committed to an older version has been overtaken, and has nothing to be waited for.
        """
        if not self.node.history.at(proposal.slot).run_config.rounds.blocking:
            return []
        trainers = {seat.peer for seat in proposal.next_roster if seat.path is not None}
        there = set(proposal.contributors)
        base = proposal.contributions[0].base_state
        known = [c for reply in promises.values() for c in reply.commitments]
        overtaken = {commitment.peer for commitment in known if commitment.base_state != base}
        return sorted((trainers & set(promises)) - there - overtaken)

    async def _gather_votes(self, proposal: Proposal) -> Certificate | None:
        """Ask everyone to vote; return as soon as a quorum agrees, without the slow ones."""
        self.node.events.write(
            "proposing",
            module=proposal.module,
            version=proposal.version,
            slot=self.ballot.slot,
            attempt=self.ballot.attempt,
            proposal=proposal.digest,
            contributors=proposal.contributors,
        )
        request = ProposeRequest(ballot=self.ballot, proposal=proposal)
        own = self._own_vote(proposal)
        asked: list[asyncio.Future[ProposeReply | None]] = [asyncio.ensure_future(own)]
        asked += [
            asyncio.ensure_future(
                self.member.courier.ask_as(
                    ProposeReply, seat.peer, Kind.PROPOSE, request, self._slot_seconds
                )
            )
            for seat in proposal.roster
            if seat.peer != self.node.peer_id
        ]
        votes: list[Vote] = []
        refusals: list[str] = []
        try:
            for answer in asyncio.as_completed(asked):
                reply = await answer
                if reply is None or reply.vote is None:
                    refusals.append(reply.reason if reply is not None else "no answer")
                elif reply.vote.is_authentic and reply.vote.ballot == self.ballot:
                    votes.append(reply.vote)
                quorum = quorum_votes(proposal, votes)
                if quorum is not None:
                    return Certificate(
                        proposal=proposal, ballot=self.ballot, result=quorum[0].result, votes=quorum
                    )
        finally:
            for task in asked:
                task.cancel()
        self._failed(f"{len(votes)} votes; otherwise: {', '.join(refusals)}")
        return None

    async def _own_vote(self, proposal: Proposal) -> ProposeReply:
        """What speaks against it here is one refusal, like that of any other member."""
        try:
            return await self.member.vote(proposal, self.ballot, sender=self.node.peer_id)
        except (SwarmError, ValueError) as error:
            return ProposeReply(reason=str(error)[:MAX_REASON_CHARACTERS])

    async def _conclude(self, certificate: Certificate) -> None:
        """Apply it and hand it out; nobody waits for what this peer may have yet to compute."""
        outcomes = await asyncio.gather(
            self.member.learn(certificate, sender=self.node.peer_id),
            self._hand_out(certificate),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _hand_out(self, certificate: Certificate) -> None:
        proposal = certificate.proposal
        self.node.events.write(
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
        others = dict.fromkeys(peers - {self.node.peer_id}, request)
        await self.member.courier.ask_all(Done, others, Kind.CERTIFY, MESSAGE_TIMEOUT_SECONDS)

    def _failed(self, why: str) -> None:
        self.node.events.write(
            "attempt failed",
            module=str(self.held.module),
            slot=self.ballot.slot,
            attempt=self.ballot.attempt,
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
