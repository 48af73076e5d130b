"""A member never votes twice in one ballot, not even after a crash."""

from pathlib import Path

from peer.acceptor import Acceptor
from tests.peer.test_certificate import PEERS, START, ballot, commitment, proposal


def test_a_promise_and_a_vote_survive_a_restart(tmp_path: Path) -> None:
    first, other = proposal(PEERS[:3]), proposal(PEERS[:3], contributions=(commitment(PEERS[1]),))
    acceptor = Acceptor(tmp_path)
    assert acceptor.promise("1.0", 1, START, ballot(1))
    assert acceptor.accept(first, ballot(1))

    restarted = Acceptor(tmp_path)
    assert not restarted.promise("1.0", 1, START, ballot(0))
    assert not restarted.accept(other, ballot(0))
    assert not restarted.accept(other, ballot(1))
    assert restarted.accept(first, ballot(1))
    state = restarted.state("1.0", 1, START)
    assert (state.accepted, state.accepted_ballot) == (first, ballot(1))


def test_a_later_ballot_and_the_next_version_are_free(tmp_path: Path) -> None:
    acceptor = Acceptor(tmp_path)
    assert acceptor.accept(proposal(PEERS[:3]), ballot(1))
    assert acceptor.accept(proposal(PEERS[:2]), ballot(2))
    assert acceptor.promise("1.0", 2, "d" * 64, ballot(0))
    assert acceptor.state("1.0", 2, "d" * 64).accepted is None
