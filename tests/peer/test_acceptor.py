"""A member never votes twice in one ballot, not even after a crash."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peer.acceptor import Acceptor, Promise
from tests.peer.test_certificate import PEERS, START, ballot, commitment, proposal

TIMEOUT_SECONDS = 10.0


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


def test_a_look_from_another_thread_takes_no_vote_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted from the disk is looked up in a thread, while the event loop votes."""
    Acceptor(tmp_path).promise("1.0", 1, START, ballot(1))
    restarted = Acceptor(tmp_path)
    looking, voted, parse = threading.Event(), threading.Event(), Promise.from_bytes

    def overtaken(*args: Any, **options: Any) -> Promise:
        looking.set()
        voted.wait(TIMEOUT_SECONDS)
        return parse(*args, **options)

    def look() -> None:
        restarted.state("1.0", 1, START)
        looking.set()

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(Promise, "from_bytes", overtaken)
        looked = pool.submit(look)
        assert looking.wait(TIMEOUT_SECONDS)
        patched.undo()
        assert restarted.accept(proposal(PEERS[:3]), ballot(2))
        voted.set()
        looked.result(TIMEOUT_SECONDS)
    assert not restarted.promise("1.0", 1, START, ballot(1))
    assert restarted.state("1.0", 1, START).accepted == proposal(PEERS[:3])
