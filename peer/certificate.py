"""When is a certificate one: the rules that make a module a replicated log. Pure functions.

A certificate is believed when a strict majority of *its own* roster signed the same result in the
same ballot, and when that roster is the one its parent named. A module's origin (version 0, or the
version it was born at) has no certificate: a signed manifest names its state. A rebuilt roster
(after two slots without a commit, or next to the origin) cannot be checked against the parent; it
is accepted when the certificate says so, and two histories that arise from it resolve by `wins`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from dht.errors import BadMessage
from peer.archive import Link
from peer.manifest import Origin
from peer.messages import Certificate, Commitment, Proposal, Seat, Vote

SLOTS_BEFORE_REBUILD = 2  # slots without a commit after which a roster may be rebuilt


def quorum_votes(proposal: Proposal, votes: Sequence[Vote]) -> tuple[Vote, ...] | None:
    """The votes of a quorum for one ballot and one result, or None while there is none.

    `votes` are authentic. Votes of different ballots never add up: a member's earlier vote may have
    been superseded (single-decree Paxos), so counting it could certify two different results.
    """
    seats = {seat.peer for seat in proposal.roster}
    equal: dict[tuple[tuple[int, int, str], str], dict[str, Vote]] = {}
    for vote in votes:
        if vote.peer in seats and vote.proposal == proposal.digest:
            equal.setdefault((vote.ballot.order, vote.result), {})[vote.peer] = vote
    for same in equal.values():
        if len(same) >= proposal.quorum:
            return tuple(same[peer] for peer in sorted(same))
    return None


def check_proposal(proposal: Proposal, *, sender: str) -> None:
    """Raise `BadMessage` unless the proposal is consistent in itself and its signatures hold."""

    def require(condition: bool, why: str) -> None:
        if not condition:
            raise BadMessage(sender, f"proposal for {proposal.module}: {why}")

    peers = proposal.contributors
    require(len(set(peers)) == len(peers), "a peer contributes twice")
    ordered = sorted(proposal.contributions, key=contribution_order)
    require(list(proposal.contributions) == ordered, "contributions out of order")
    for roster in (proposal.roster, proposal.next_roster):
        names = [seat.peer for seat in roster]
        require(names == sorted(set(names)), "a roster is not sorted or names a peer twice")
    first = proposal.contributions[0]
    for commitment in proposal.contributions:
        require(commitment.run == proposal.run, "a contribution to another run")
        require(commitment.module == proposal.module, "a contribution to another module")
        require(
            commitment.base_version == proposal.version - 1, "a contribution to another version"
        )
        require(commitment.base_state == first.base_state, "contributions to different states")
        require(commitment.slot == first.slot, "contributions of different slots")
        require(commitment.manifest == first.manifest, "contributions under different manifests")
        require(commitment.is_authentic, "a forged contribution")


def check_certificate(certificate: Certificate, *, sender: str) -> None:
    """Raise `BadMessage` unless a quorum of the certificate's own roster signed it."""
    proposal = certificate.proposal
    check_proposal(proposal, sender=sender)
    for vote in certificate.votes:
        if vote.ballot != certificate.ballot or vote.result != certificate.result:
            raise BadMessage(
                sender, f"certificate for {proposal.module}: a vote for something else"
            )
        if not vote.is_authentic:
            raise BadMessage(sender, f"certificate for {proposal.module}: a forged vote")
    if quorum_votes(proposal, certificate.votes) is None:
        raise BadMessage(sender, f"certificate for {proposal.module}: no quorum")


def check_link(
    certificate: Certificate, parent: Certificate | None, *, origin: Origin, slot: int, sender: str
) -> None:
    """Raise `BadMessage` unless `certificate` continues `parent` (None: the module's origin).

    `slot` is the clock's. What comes with time, such as a rebuilt roster, must have come: a
    certificate is not of a slot after the next one.
    """
    proposal, in_slot = certificate.proposal, certificate.ballot.slot
    if in_slot > slot + 1:
        raise BadMessage(
            sender, f"certificate {proposal.module} v{proposal.version}: of a slot to come"
        )
    check_succession(proposal, parent, origin=origin, slot=in_slot, sender=sender)
    if not is_roster_due(proposal, parent, in_slot):
        raise BadMessage(sender, f"certificate {proposal.module} v{proposal.version}: wrong roster")


def check_succession(
    proposal: Proposal, parent: Certificate | None, *, origin: Origin, slot: int, sender: str
) -> None:
    """Raise `BadMessage` unless a ballot of `slot` may make `proposal` the version after `parent`
    (None: the module's origin).

    Whoever votes asks this, too: votes for what no certificate can be made of would bind the
    members to it, and the module would stand still.
    """

    def require(condition: bool, why: str) -> None:
        if not condition:
            raise BadMessage(sender, f"{proposal.module} v{proposal.version}: {why}")

    version, digest, state = (origin.version, origin.state.digest, origin.state.digest)
    if parent is not None:
        version, digest, state = (parent.version, parent.digest, parent.result)
    require(proposal.version == version + 1 and proposal.parent == digest, "wrong parent")
    before = parent.proposal.slot if parent is not None else -1
    require(before < proposal.slot <= slot, "wrong slot")
    require(all(c.base_state == state for c in proposal.contributions), "wrong base")


def is_roster_due(proposal: Proposal, parent: Certificate | None, slot: int) -> bool:
    """Whether the proposal's roster is the one that its parent named, or may be a rebuilt one."""
    if proposal.rebuilt:
        return may_rebuild(parent, slot)
    return parent is not None and proposal.roster == parent.proposal.next_roster


def may_rebuild(parent: Certificate | None, slot: int) -> bool:
    """Whether a roster made from the announcements is acceptable in `slot`."""
    # Not its ballot's slot: that need not be the same in all copies of a certificate.
    return parent is None or slot - parent.proposal.slot > SLOTS_BEFORE_REBUILD


def check_chain(
    certificates: Sequence[Certificate],
    parent: Certificate | None,
    *,
    origin: Origin,
    slot: int,
    sender: str,
) -> None:
    """Raise `BadMessage` unless each certificate holds and continues the one before it."""
    for certificate in certificates:
        check_certificate(certificate, sender=sender)
        check_link(certificate, parent, origin=origin, slot=slot, sender=sender)
        parent = certificate


def wins(theirs: Sequence[Link], ours: Sequence[Link]) -> bool:
    """Whether everyone settles on `theirs`, of two histories of a module from where they part.

    The longer one first, since nobody goes back: else a short history with more tokens in its first
    version would stay beside a long one for ever. Of two equally long ones, that with more tokens
    in its first version, then the smaller digest: a rule that needs no further message.
    """

    def order(history: Sequence[Link]) -> tuple[int, int, str]:
        return -len(history), -history[0].proposal.tokens, history[0].digest

    return order(theirs) < order(ours)


def facts(certificate: Certificate) -> dict[str, Any]:
    """What an event log says of a certificate, so that whoever reads the logs can check history."""
    proposal, ballot = certificate.proposal, certificate.ballot
    return {
        "module": proposal.module,
        "version": proposal.version,
        "certificate": certificate.digest,
        "parent": proposal.parent,
        "proposal": proposal.digest,
        "state": certificate.result,
        "slot": ballot.slot,
        "attempt": ballot.attempt,
        "leader": ballot.leader,
        "trained_slot": proposal.slot,
        "contributors": proposal.contributors,
        "merged": sum(bool(commitment.merged) for commitment in proposal.contributions),
        "voters": [vote.peer for vote in certificate.votes],
        "roster": len(proposal.roster),
        "rebuilt": proposal.rebuilt,
    }


def counted(commitments: Iterable[Commitment], limit: int) -> list[Commitment]:
    """At most `limit` commitments, in the order in which they are added up.

    A merged one goes before what it is made of, and nothing counts twice. Then every path's largest
    first, then every path's second, and so on, those with more tokens before others. What is left
    out is not lost: its peer goes on from there, and offers more next time.
    """
    by_path: dict[str, list[Commitment]] = {}
    there: set[str] = set()
    for commitment in sorted(commitments, key=lambda c: (-len(c.merged), -c.tokens, c.peer)):
        peers = {part.peer for part in commitment.parts}
        if there.isdisjoint(peers):
            there |= peers
            by_path.setdefault(commitment.path, []).append(commitment)
    ranked = [
        (rank, -commitment.tokens, commitment.peer, commitment)
        for on_path in by_path.values()
        for rank, commitment in enumerate(on_path)
    ]
    chosen = [commitment for *_, commitment in sorted(ranked, key=lambda entry: entry[:3])]
    return sorted(chosen[:limit], key=contribution_order)


def contribution_order(commitment: Commitment) -> tuple[tuple[int, ...], str]:
    """The order in which contributions are added up: by path, then peer."""
    return tuple(int(part) for part in commitment.path.split(".")), commitment.peer


def roster_of(seats: Sequence[Seat]) -> tuple[Seat, ...]:
    """Canonical form of a roster: one seat per peer, sorted; a trainer's seat beats a keeper's."""
    by_peer: dict[str, Seat] = {}
    for seat in seats:
        if seat.peer not in by_peer or by_peer[seat.peer].path is None:
            by_peer[seat.peer] = seat
    return tuple(by_peer[peer] for peer in sorted(by_peer))
