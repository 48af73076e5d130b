"""A member's part of a round: hold contributions, promise, reduce for itself, vote, apply.

Everything here answers another peer. What decides is in `certificate.py` and `acceptor.py`; what
reduces is in `reducer.py`. A version is applied only with a certificate (promise P1).
"""

from collections.abc import Awaitable, Callable

from dht.errors import BadMessage, PeerFault
from dipaco.topology import ModuleID
from peer.acceptor import Acceptor
from peer.archive import whole
from peer.certificate import (
    check_certificate,
    check_link,
    check_proposal,
    check_succession,
    facts,
    is_roster_due,
    may_rebuild,
)
from peer.changes import Changes
from peer.contributions import Contributions
from peer.courier import Answer, Courier, Kind
from peer.heads import Heads
from peer.messages import (
    MAX_ROSTER,
    Ballot,
    Certificate,
    CertifyRequest,
    Commitment,
    CommitRequest,
    Done,
    HaveReply,
    HaveRequest,
    Message,
    Proposal,
    ProposeReply,
    ProposeRequest,
    Vote,
    sign,
)
from peer.modules import Held
from peer.node import Node
from peer.reducer import Reducer

FRESH_SECONDS = 1.0  # how old the heads may be by which a rebuilt roster is judged
PULL_SHARE = 0.5  # of a slot: how long after its end members may go on pulling, on slow lines


class Member:
    """Answers the round's messages for every module that this peer holds."""

    def __init__(
        self,
        node: Node,
        heads: Heads,
        *,
        on_version: Callable[[ModuleID, Certificate], None],
        on_behind: Callable[[ModuleID], None],
        on_manifest: Callable[[str, str], None],
    ) -> None:
        self._node = node
        self._heads = heads
        self._on_version = on_version
        self._on_behind = on_behind
        self._acceptor = Acceptor(node.state_dir / "promises")
        self.retiring: set[ModuleID] = set()  # held still, but only until the next roster
        self._pulling: dict[ModuleID, tuple[int, float]] = {}  # slot, and until when
        self.courier = Courier(node.transport, node.faults)
        self.changes = Changes()
        self.contributions = Contributions(node, self.changes, on_manifest=on_manifest)
        self._reducer = Reducer(node, self.contributions, on_behind=on_behind)

    async def serve(self) -> None:
        """Start answering."""
        await self.courier.serve(
            {
                Kind.COMMIT: self._answering(self._on_commit),
                Kind.HAVE: self._answering(self._on_have),
                Kind.PROPOSE: self._answering(self._on_propose),
                Kind.CERTIFY: self._answering(self._on_certify),
            }
        )

    async def close(self) -> None:
        """Stop what is under way; what is being written gets there."""
        await self.courier.close()
        await self.contributions.close()
        await self._reducer.close()

    def pulls_until(self, module: ModuleID, slot: int) -> float:
        """Until when a leader that was heard of in `slot` lets members pull; 0 if there is none."""
        history = self._node.history
        seconds = PULL_SHARE * history.first.run_config.rounds.round_seconds
        limit = history.round_end(module, slot) + seconds
        of_slot, until = self._pulling.get(module, (slot, 0.0))
        return min(limit, until) if of_slot == slot else 0.0

    def bound_blobs(self) -> set[str]:
        """The contributions to what this member has voted for, as long as nothing is certified.

        Without them nobody might be able to make a certificate of it, or of anything else. On any
        thread.
        """
        blobs: set[str] = set()
        for module, held in list(self._node.log.held.items()):
            state = self._acceptor.state(str(module), held.version + 1, held.parent)
            if state.accepted is not None:
                blobs.update(commitment.blob for commitment in state.accepted.contributions)
        return blobs

    def caught_up(self, module: ModuleID, certificate: Certificate) -> None:
        """Tell whoever waits that the module was brought forward from outside the round."""
        self._reducer.settle(module, certificate.result)
        self._on_version(module, certificate)
        self.changes.notify()

    async def have(self, request: HaveRequest, *, sender: str) -> HaveReply:
        """Promise the ballot if we can, then wait until the commitments' bytes are here."""
        module, held = self._held(request.module, request.run, sender)
        if held.version >= request.version:
            return HaveReply(
                promised=False,
                held=(),
                commitments=(),
                certificate=_next(held, request.version - 1),
            )
        if held.version != request.version - 1 or held.parent != request.parent:
            self._on_behind(module)
            return HaveReply(promised=False, held=(), commitments=())
        if not self._may_lead(request.ballot, held):
            raise BadMessage(sender, "a ballot of a slot that is not now, or without a seat")
        promised = self._acceptor.promise(
            request.module, request.version, request.parent, request.ballot
        )
        self._pulling[module] = (request.ballot.slot, self._node.now() + request.wait_seconds)
        wanted = [
            c
            for c in request.commitments
            if (c.module, c.slot) == (str(module), request.ballot.slot)
            and self._add(c, sender, is_asked_for=True)
        ]
        await self.changes.until(
            lambda: len(self.contributions.held(wanted)) == len(wanted), request.wait_seconds
        )
        known = self.contributions.known(module, request.ballot.slot)
        state = self._acceptor.state(request.module, request.version, request.parent)
        return HaveReply(
            promised=promised and state.promised == request.ballot,  # still: others asked meanwhile
            leaving=module in self.retiring,
            held=tuple(c.digest for c in self.contributions.held(known)),
            commitments=tuple(known),
            accepted=state.accepted,
            accepted_ballot=state.accepted_ballot,
        )

    async def vote(self, proposal: Proposal, ballot: Ballot, *, sender: str) -> ProposeReply:
        """Reduce the proposal and vote for it, or say why not."""
        node = self._node
        module, held = self._held(proposal.module, proposal.run, sender)
        if held.version >= proposal.version:
            done = _next(held, proposal.version - 1)
            return ProposeReply(reason="done already", certificate=done)
        if held.version != proposal.version - 1 or held.parent != proposal.parent:
            self._on_behind(module)
            return ProposeReply(reason="this member is at another version")
        if not self._may_lead(ballot, held):
            return ProposeReply(reason="a ballot of a slot that is not now, or without a seat")
        check_proposal(proposal, sender=sender)
        check_succession(
            proposal, held.certificate, origin=held.origin, slot=ballot.slot, sender=sender
        )
        if not self._is_manifest_in_force(proposal, ballot.slot):
            return ProposeReply(reason="not by the manifest that this member knows to be in force")
        if not await self._roster_is_right(proposal, held, ballot.slot):
            return ProposeReply(reason="not the roster this member knows")
        if node.peer_id not in {seat.peer for seat in proposal.roster}:
            return ProposeReply(reason="not a member")
        result = await self._reducer.reduce(module, proposal, sources=[sender])
        if result is None:
            return ProposeReply(reason="a contribution cannot be had")
        if not self._acceptor.accept(proposal, ballot):
            return ProposeReply(reason="promised a later ballot")
        vote = sign(
            Vote(peer=node.peer_id, ballot=ballot, proposal=proposal.digest, result=result.state),
            node.identity,
        )
        node.events.write(
            "voted",
            module=proposal.module,
            version=proposal.version,
            slot=ballot.slot,
            attempt=ballot.attempt,
            leader=ballot.leader,
            parent=proposal.parent,
            proposal=proposal.digest,
            state=result.state,
        )
        return ProposeReply(vote=vote)

    async def learn(self, certificate: Certificate, *, sender: str) -> bool:
        """Apply a certificate if it is the next one; True if this peer is now at its version."""
        module, held = self._held(certificate.module, certificate.proposal.run, sender)
        if held.version >= certificate.version:
            ours = _next(held, certificate.version - 1)
            if ours is not None and ours.digest != certificate.digest:
                self._on_behind(module)  # another history: let catch-up compare the two
            return held.version == certificate.version
        if held.version != certificate.version - 1 or held.parent != certificate.proposal.parent:
            self._on_behind(module)
            return False
        check_certificate(certificate, sender=sender)
        slot = self._node.slot
        check_link(certificate, held.certificate, origin=held.origin, slot=slot, sender=sender)
        result = await self._reducer.reduce(module, certificate.proposal, sources=[sender])
        if result is not None and result.state != certificate.result:
            self._node.events.write(
                "diverged", module=str(module), ours=result.state, certified=certificate.result
            )
        # Who is killed now comes back with this version: what it was made of is on the disk, with
        # the version before once that is there. So the disk is one version behind at most.
        await self._reducer.written(held.state)
        if certificate.result not in self._node.store:
            self._on_behind(module)
            return False
        return self._apply(module, certificate)

    def _add(self, commitment: Commitment, sender: str, *, is_asked_for: bool) -> bool:
        """Take in a commitment; a bad one is counted against whoever it speaks against."""
        try:
            return self.contributions.add(commitment, sender=sender, is_asked_for=is_asked_for)
        except BadMessage as error:
            self._node.faults.count(error, error.peer_id)
            return False

    def _may_lead(self, ballot: Ballot, held: Held) -> bool:
        """Whether a promise to this ballot could not be used to block the module for good."""
        if abs(ballot.slot - self._node.slot) > 1:
            return False
        seats = held.certificate.proposal.next_roster if held.certificate is not None else ()
        return may_rebuild(held.certificate, ballot.slot) or any(
            seat.peer == ballot.leader for seat in seats
        )

    def _apply(self, module: ModuleID, certificate: Certificate) -> bool:
        node = self._node
        held = node.log.held[module]
        if held.version != certificate.version - 1:  # somebody was faster while we computed
            return held.version == certificate.version
        update = self._reducer.settle(module, certificate.result)
        node.log.adopt(module, [*held.chain, certificate])
        self._reducer.write(certificate.result)
        node.events.write(
            "version",
            **facts(certificate),
            manifest=certificate.proposal.manifest,
            norm_ratio=round(update.norm_ratio, 4) if update is not None else None,
            num_clipped=update.num_clipped if update is not None else None,
        )
        self._on_version(module, certificate)
        self.changes.notify()
        return True

    def _is_manifest_in_force(self, proposal: Proposal, slot: int) -> bool:
        """Whether the contributions were made under the manifest of their slot.

        One that is not known here is searched for when they are pulled. What is proposed again in a
        later slot may have been voted for before somebody heard of a later manifest: refusing that
        would stop the module for good.
        """
        history = self._node.history
        manifest = history.get(proposal.manifest)
        return manifest is None or proposal.slot < slot or manifest is history.at(proposal.slot)

    async def _roster_is_right(self, proposal: Proposal, held: Held, slot: int) -> bool:
        """A rebuilt roster must have everyone in it whom we see, so that two leaders with partial
        views cannot each find a majority of their own.
        """
        if proposal.rebuilt:
            await self._heads.read(held.module, max_age_seconds=FRESH_SECONDS)
            seen = {head.peer for head in self._heads.holders(held.module, held.version)}
            seated = {seat.peer for seat in proposal.roster}
            if not seen <= seated and len(seated) < MAX_ROSTER:
                return False
        return is_roster_due(proposal, held.certificate, slot)

    def _held(self, name: str, run: str, sender: str) -> tuple[ModuleID, Held]:
        module = ModuleID.parse(name)
        held = self._node.log.held.get(module)
        if run != self._node.run:
            raise BadMessage(sender, "a message of another run")
        if held is None:
            raise ValueError(f"module {module} is not held here")
        return module, held

    # The handlers: parse, answer.

    def _answering(self, handler: Callable[[str, bytes], Awaitable[Message]]) -> Answer:
        """Make an answer of bytes of it; what its asker did wrong is counted."""

        async def answer(peer_id: str, payload: bytes) -> bytes:
            try:
                return (await handler(peer_id, payload)).to_bytes()
            except PeerFault as error:
                self._node.faults.count(error, error.peer_id)
                raise

        return answer

    async def _on_commit(self, peer_id: str, payload: bytes) -> Message:
        request = CommitRequest.from_bytes(payload, sender=peer_id)
        for commitment in request.commitments:
            if ModuleID.parse(commitment.module) in self._node.log.held:
                self._add(commitment, peer_id, is_asked_for=False)
        return Done()

    async def _on_have(self, peer_id: str, payload: bytes) -> Message:
        request = HaveRequest.from_bytes(payload, sender=peer_id)
        _check_leader(request.ballot, peer_id)
        return await self.have(request, sender=peer_id)

    async def _on_propose(self, peer_id: str, payload: bytes) -> Message:
        request = ProposeRequest.from_bytes(payload, sender=peer_id)
        _check_leader(request.ballot, peer_id)
        return await self.vote(request.proposal, request.ballot, sender=peer_id)

    async def _on_certify(self, peer_id: str, payload: bytes) -> Message:
        request = CertifyRequest.from_bytes(payload, sender=peer_id)
        await self.learn(request.certificate, sender=peer_id)
        return Done()


def _next(held: Held, version: int) -> Certificate | None:
    """The certificate of the version after `version`; None if that is not later than the origin."""
    after = held.after(version)
    return whole(after[0]) if after and after[0].version == version + 1 else None


def _check_leader(ballot: Ballot, peer_id: str) -> None:
    if ballot.leader != peer_id:
        raise BadMessage(peer_id, "a ballot in another peer's name")
