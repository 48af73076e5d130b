"""What makes a certificate one, and what does not."""

import pytest

from dht.errors import BadMessage
from dht.identity import Identity
from peer.certificate import (
    check_certificate,
    check_link,
    check_proposal,
    check_succession,
    contribution_order,
    counted,
    quorum_votes,
    wins,
)
from peer.manifest import BlobRef, Origin
from peer.messages import MAX_COUNTED, Ballot, Certificate, Commitment, Proposal, Seat, Vote, sign

PEERS = sorted((Identity(bytes([n]) * 32) for n in range(1, 6)), key=lambda i: i.peer_id)
RUN, START, RESULT = "a" * 64, "b" * 64, "c" * 64
ORIGIN = Origin(version=0, state=BlobRef(digest=START, num_bytes=1))


def commitment(
    who: Identity, *, tokens: int = 100, path: str = "0.0", **changes: object
) -> Commitment:
    values = {
        "peer": who.peer_id,
        "run": RUN,
        "manifest": RUN,
        "module": "1.0",
        "slot": 3,
        "base_version": 0,
        "base_state": START,
        "path": path,
        "tokens": tokens,
        "blob": f"{tokens:064x}",
        "blob_bytes": 10,
    }
    return sign(Commitment(**{**values, **changes}), who)


def proposal(members: list[Identity], **changes: object) -> Proposal:
    roster = tuple(Seat(peer=i.peer_id, path="0.0") for i in members)
    values = {
        "run": RUN,
        "module": "1.0",
        "version": 1,
        "parent": START,
        "contributions": (commitment(members[0]),),
        "roster": roster,
        "rebuilt": True,
        "next_roster": roster,
    }
    return Proposal(**{**values, **changes})


def ballot(attempt: int = 0) -> Ballot:
    return Ballot(slot=3, attempt=attempt, leader=PEERS[0].peer_id)


def vote(who: Identity, what: Proposal, *, attempt: int = 0, result: str = RESULT) -> Vote:
    return sign(
        Vote(peer=who.peer_id, ballot=ballot(attempt), proposal=what.digest, result=result), who
    )


def certificate(what: Proposal, voters: list[Identity], *, attempt: int = 0) -> Certificate:
    votes = tuple(vote(who, what, attempt=attempt) for who in voters)
    return Certificate(proposal=what, ballot=ballot(attempt), result=RESULT, votes=votes)


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_a_quorum_is_a_strict_majority(size: int, needed: int) -> None:
    what = proposal(PEERS[:size])
    votes = [vote(who, what) for who in PEERS[:size]]
    assert quorum_votes(what, votes[: needed - 1]) is None
    assert len(quorum_votes(what, votes[:needed]) or ()) == needed


def test_votes_that_differ_or_come_twice_or_from_outside_do_not_add_up() -> None:
    what = proposal(PEERS[:3])
    one = vote(PEERS[0], what)
    assert quorum_votes(what, [one, one]) is None
    assert quorum_votes(what, [one, vote(PEERS[4], what)]) is None
    assert quorum_votes(what, [one, vote(PEERS[1], what, result="d" * 64)]) is None
    # Equal results in different ballots could certify two histories (see `quorum_votes`).
    assert quorum_votes(what, [one, vote(PEERS[1], what, attempt=1)]) is None


def test_a_sound_certificate_passes_and_each_forgery_does_not() -> None:
    what = proposal(PEERS[:3])
    good = certificate(what, PEERS[:2])
    check_certificate(good, sender="x")
    check_link(good, None, origin=ORIGIN, slot=3, sender="x")
    forged_vote = good.votes[0].model_copy(update={"signature": "0" * 128})
    forgeries = [
        good.model_copy(update={"votes": good.votes[:1]}),
        good.model_copy(update={"votes": (forged_vote, good.votes[1])}),
        good.model_copy(update={"result": "d" * 64}),
        certificate(
            proposal(PEERS[:3], contributions=(commitment(PEERS[0], run="d" * 64),)), PEERS[:2]
        ),
    ]
    for forgery in forgeries:
        with pytest.raises(BadMessage):
            check_certificate(forgery, sender="x")


def test_a_link_needs_the_right_parent_base_and_roster() -> None:
    earlier = commitment(PEERS[0], slot=2)
    first = certificate(proposal(PEERS[:3], contributions=(earlier,)), PEERS[:2])
    changes = {"version": 2, "parent": first.digest, "rebuilt": False}
    contribution = commitment(PEERS[0], base_version=1, base_state=RESULT)
    second = certificate(proposal(PEERS[:3], contributions=(contribution,), **changes), PEERS[:2])
    check_link(second, first, origin=ORIGIN, slot=3, sender="x")
    with pytest.raises(BadMessage, match="wrong parent"):
        check_link(second, None, origin=ORIGIN, slot=3, sender="x")
    other_roster = certificate(
        proposal(PEERS[:1], contributions=(contribution,), **changes), PEERS[:1]
    )
    with pytest.raises(BadMessage, match="wrong roster"):
        check_link(other_roster, first, origin=ORIGIN, slot=3, sender="x")
    check_link(second, first, origin=ORIGIN, slot=2, sender="x")  # of a clock that is behind
    with pytest.raises(BadMessage, match="slot to come"):
        check_link(second, first, origin=ORIGIN, slot=1, sender="x")
    for slot in (2, 4):  # its parent's, and one that its ballot's comes before
        late = commitment(PEERS[0], base_version=1, base_state=RESULT, slot=slot)
        again = certificate(proposal(PEERS[:3], contributions=(late,), **changes), PEERS[:2])
        with pytest.raises(BadMessage, match="wrong slot"):
            check_link(again, first, origin=ORIGIN, slot=3, sender="x")
    stale = commitment(PEERS[0], base_version=1, base_state=START)
    with pytest.raises(BadMessage, match="wrong base"):
        check_link(
            certificate(proposal(PEERS[:3], contributions=(stale,), **changes), PEERS[:2]),
            first,
            origin=ORIGIN,
            slot=3,
            sender="x",
        )


def test_who_votes_asks_for_the_same_parent_base_and_slot() -> None:
    earlier = commitment(PEERS[0], slot=2)
    first = certificate(proposal(PEERS[:3], contributions=(earlier,)), PEERS[:2])

    def second(**changes: object) -> Proposal:
        values = {"base_version": 1, "base_state": RESULT, **changes}
        contributions = (commitment(PEERS[0], **values),)
        what = proposal(PEERS[:3], version=2, parent=first.digest, contributions=contributions)
        check_proposal(what, sender="x")
        return what

    check_succession(second(), first, origin=ORIGIN, slot=3, sender="x")
    check_succession(second(), first, origin=ORIGIN, slot=9, sender="x")  # proposed again
    check_succession(first.proposal, None, origin=ORIGIN, slot=2, sender="x")
    wrong: list[tuple[str, Proposal, Certificate | None]] = [
        ("wrong base", second(base_state=START), first),
        ("wrong slot", second(slot=2), first),
        ("wrong slot", second(slot=4), first),
        ("wrong parent", second(), None),
        ("wrong parent", first.proposal, first),
    ]
    for why, what, parent in wrong:
        with pytest.raises(BadMessage, match=why):
            check_succession(what, parent, origin=ORIGIN, slot=3, sender="x")


def test_a_proposal_of_more_than_a_version_counts_is_none() -> None:
    most = tuple(commitment(PEERS[0]) for _ in range(MAX_COUNTED))
    assert len(proposal(PEERS[:1], contributions=most).contributions) == MAX_COUNTED
    with pytest.raises(ValueError, match=f"at most {MAX_COUNTED}"):
        proposal(PEERS[:1], contributions=(*most, most[0]))


def test_what_two_ballots_certified_is_one_certificate() -> None:
    """A leader that is cut off after the votes, and the next one, which hears of them."""
    what = proposal(PEERS[:3])
    first, again = certificate(what, PEERS[:2]), certificate(what, PEERS[1:3], attempt=1)
    check_certificate(again, sender="x")
    assert again.ballot != first.ballot
    assert again.digest == first.digest
    other = certificate(proposal(PEERS[:3], rebuilt=False), PEERS[:2])
    assert other.digest != first.digest


def test_of_too_many_contributions_every_path_keeps_its_largest() -> None:
    tokens = [("0.0", 5), ("0.0", 90), ("0.0", 70), ("1.1", 3), ("0.1", 20)]
    offered = [
        commitment(who, path=path, tokens=number)
        for who, (path, number) in zip(PEERS, tokens, strict=True)
    ]
    assert [c.tokens for c in counted(offered, 3)] == [90, 20, 3]
    assert [c.tokens for c in counted(offered, 2)] == [90, 20]
    largest_two = {c.tokens for c in counted(offered, 4) if c.path == "0.0"}
    assert largest_two == {90, 70}
    assert sorted(counted(offered, 16), key=contribution_order) == counted(reversed(offered), 16)


def test_a_proposal_counts_each_peer_once_and_in_order() -> None:
    one, two = commitment(PEERS[0], path="1.0"), commitment(PEERS[1], path="0.1")
    check_proposal(proposal(PEERS[:2], contributions=(two, one)), sender="x")
    for wrong in ((one, two), (one, one)):
        with pytest.raises(BadMessage):
            check_proposal(proposal(PEERS[:2], contributions=wrong), sender="x")
    unsigned = one.model_copy(update={"tokens": 10**9})
    with pytest.raises(BadMessage, match="forged"):
        check_proposal(proposal(PEERS[:2], contributions=(unsigned,)), sender="x")


def test_of_two_histories_the_longer_wins_then_more_tokens_then_the_smaller_digest() -> None:
    small = certificate(proposal(PEERS[:1]), PEERS[:1])
    large = certificate(
        proposal(PEERS[:1], contributions=(commitment(PEERS[0], tokens=101),)), PEERS[:1]
    )
    twin = certificate(proposal(PEERS[:2]), PEERS[:2])
    histories = [[small, twin], [large], *sorted(([small], [twin]), key=lambda h: h[0].digest)]
    for place, ours in enumerate(histories):
        for other, theirs in enumerate(histories):
            assert wins(theirs, ours) is (other < place)
