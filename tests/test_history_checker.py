"""The checker of histories finds every violation in logs that were written with one in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.history_checker import Event, History, check, check_logs

PEERS = ("peer-a", "peer-b", "peer-c")
Logs = dict[str, list[Event]]


def version(number: int, *, slot: int | None = None, **changes: Any) -> Event:
    """One version of module 0.0 as every peer applies it; slot n makes version n + 1."""
    slot = number - 1 if slot is None else slot
    return {
        "event": "version",
        "module": "0.0",
        "version": number,
        "certificate": f"certificate {number}",
        "parent": f"certificate {number - 1}",
        "proposal": f"proposal {number}",
        "state": f"state {number}",
        "slot": slot,
        "attempt": 0,
        "leader": "peer-a",
        "trained_slot": slot,
        "contributors": ["peer-a", "peer-b"],
        "voters": ["peer-a", "peer-b"],
        "roster": 3,
        "rebuilt": False,
        **changes,
    }


def vote(certificate: Event, **changes: Any) -> Event:
    names = ("module", "version", "parent", "proposal", "state", "slot", "attempt", "leader")
    return {"event": "voted", **{name: certificate[name] for name in names}, **changes}


def commitment(certificate: Event) -> Event:
    return {
        "event": "committed",
        "module": "0.0",
        "slot": certificate["trained_slot"],
        "base_version": certificate["version"] - 1,
    }


def logs_of(certificates: Sequence[Event]) -> Logs:
    """What three peers log that make these versions one after the other."""
    logs: Logs = {peer: [{"event": "started", "run": "run", "peer": peer}] for peer in PEERS}
    for certificate in certificates:
        for peer, log in logs.items():
            log += [commitment(certificate)] if peer in certificate["contributors"] else []
            log += [vote(certificate)] if peer in certificate["voters"] else []
            log.append(certificate)
    return logs


def violations(logs: Logs) -> tuple[str, ...]:
    return check([History(run="run", peer=p, events=log) for p, log in logs.items()]).violations


def sound() -> Logs:
    return logs_of([version(1), version(2), version(3)])


def test_a_sound_history_is_sound() -> None:
    logs = sound()
    logs["peer-b"] += [{"event": "started"}, {**version(3), "event": "resumed"}]
    logs["peer-c"] += [{**version(5, slot=4, voters=["x", "y"], contributors=["x"]),
                        "event": "caught up"}]  # fmt: skip
    assert violations(logs) == ()


def test_two_histories_from_rebuilt_rosters_are_sound_once_one_is_given_up() -> None:
    logs = sound()
    other = version(4, certificate="other", proposal="other", state="other", rebuilt=True)
    last = version(4, rebuilt=True)
    for peer in ("peer-a", "peer-b"):
        logs[peer] += [commitment(last), vote(last), last]
    lonely = {**other, "voters": ["peer-c"], "roster": 1, "contributors": []}
    logs["peer-c"] += [
        vote(lonely),
        lonely,
        {"event": "fork", "module": "0.0", "version": 4, "lost": True},
        {**last, "event": "caught up"},
    ]
    assert violations(logs) == ()
    del logs["peer-c"][-2]
    assert violations(logs) == ("peer-c: module 0.0 went from version 4 to 4 (caught up)",)


def test_histories_that_rebuilt_rosters_began_may_go_on_side_by_side() -> None:
    """Until one is given up; also by a peer that is killed before it can say so."""
    logs = sound()
    ours = [version(4, rebuilt=True), version(5)]
    for peer in ("peer-a", "peer-b"):
        logs[peer] += [entry for one in ours for entry in (commitment(one), vote(one), one)]
    alone = {"voters": ["peer-c"], "roster": 1, "contributors": [], "state": "other"}
    theirs = [
        {**version(4, certificate="c4", proposal="c4", rebuilt=True), **alone},
        {**version(5, certificate="c5", proposal="c5", parent="c4"), **alone},
    ]
    logs["peer-c"] += [entry for one in theirs for entry in (vote(one), one)]
    assert violations(logs) == ()
    logs["peer-c"] += [
        {"event": "fork", "module": "0.0", "version": 4, "lost": True},
        {"event": "started"},
        {**ours[-1], "event": "resumed"},
    ]
    assert violations(logs) == ()


def another_certificate(logs: Logs) -> None:
    other = version(3, certificate="other", proposal="other", state="other")
    for peer in ("peer-a", "peer-b"):
        logs[peer][-2:] = [vote(version(3)), version(3), vote(other, slot=9), {**other, "slot": 9}]


def another_state(logs: Logs) -> None:
    logs["peer-c"][-1] = version(3, certificate="other", state="other", voters=["x", "y"])


def another_history(logs: Logs) -> None:
    """Two quorums, in whose histories no roster was rebuilt, each for its own version after 3."""
    strangers = {"voters": ["x", "y"], "contributors": ["x"]}
    for peer, log in logs.items():
        for number in (4, 5):
            next_one = version(number)
            log += [commitment(next_one)] if peer in next_one["contributors"] else []
            log += [vote(next_one)] if peer in next_one["voters"] else []
            log += [next_one] if peer != "peer-c" else []
    logs["peer-c"].append(
        version(5, certificate="other", parent="another 4", proposal="other", state="other",
                slot=9, **strangers) | {"event": "caught up"}
    )  # fmt: skip


def own_result_differed(logs: Logs) -> None:
    logs["peer-c"].append({"event": "diverged", "module": "0.0", "ours": "x", "certified": "y"})


def too_few_votes(logs: Logs) -> None:
    logs["peer-c"][-1] = version(3, voters=["peer-a"])


def a_vote_that_was_not_cast(logs: Logs) -> None:
    logs["peer-b"] = [e for e in logs["peer-b"] if e != vote(version(3))]


def a_vote_of_another_ballot(logs: Logs) -> None:
    position = logs["peer-b"].index(vote(version(3)))
    logs["peer-b"][position] = vote(version(3), attempt=1)


def version_twice(logs: Logs) -> None:
    logs["peer-c"].append(version(3))


def version_left_out(logs: Logs) -> None:
    logs["peer-c"].remove(version(2))


def version_on_another_parent(logs: Logs) -> None:
    logs["peer-c"][-2] = version(2, certificate="other", voters=["x", "y"], rebuilt=True)


def older_after_a_restart(logs: Logs) -> None:
    logs["peer-c"] += [{"event": "started"}, {**version(2), "event": "resumed"}]


def other_bytes_after_a_restart(logs: Logs) -> None:
    other = version(3, certificate="other", proposal="other", state="other", rebuilt=True)
    strangers = {"voters": ["x", "y"], "contributors": ["x"]}
    logs["peer-c"] += [{"event": "started"}, {**other, **strangers, "event": "resumed"}]


def caught_up_with_the_past(logs: Logs) -> None:
    logs["peer-c"].append({**version(2), "event": "caught up"})


def two_votes_in_one_ballot(logs: Logs) -> None:
    logs["peer-b"].insert(-1, vote(version(3), proposal="other", state="other"))


def two_votes_in_one_ballot_on_two_parents(logs: Logs) -> None:
    other = vote(version(3), parent="another 2", proposal="other", state="other")
    logs["peer-b"].insert(-1, other)


def vote_in_an_older_ballot(logs: Logs) -> None:
    position = logs["peer-b"].index(vote(version(3)))
    logs["peer-b"].insert(position, vote(version(3), attempt=1))


def contribution_counted_again(logs: Logs) -> None:
    again = version(4, trained_slot=2)
    for peer, log in logs.items():
        log += [commitment(again), vote(again), again] if peer in again["voters"] else [again]


def one_peer_counted_twice(logs: Logs) -> None:
    logs["peer-c"][-1] = version(3, contributors=["peer-a", "peer-a"])


def contribution_without_commitment(logs: Logs) -> None:
    logs["peer-b"] = [e for e in logs["peer-b"] if e != commitment(version(3))]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (another_certificate, "version 3 has two certificates"),
        (another_history, "version 5 has two certificates"),
        (another_state, "different states"),
        (own_result_differed, "computed another state"),
        (too_few_votes, "applied with 1 votes, roster of 3"),
        (a_vote_that_was_not_cast, "applied with a vote that peer-b did not cast"),
        (a_vote_of_another_ballot, "applied with a vote that peer-b did not cast"),
        (version_twice, "peer-c: module 0.0 went from version 3 to 3"),
        (version_left_out, "peer-c: module 0.0 went from version 1 to 3"),
        (version_on_another_parent, "peer-c: module 0.0 went from version 2 to 3"),
        (older_after_a_restart, "peer-c: module 0.0 went from version 3 to 2 (resumed)"),
        (other_bytes_after_a_restart, "peer-c: module 0.0 went from version 3 to 3 (resumed)"),
        (caught_up_with_the_past, "peer-c: module 0.0 went from version 3 to 2 (caught up)"),
        (two_votes_in_one_ballot, "two votes in one ballot"),
        (two_votes_in_one_ballot_on_two_parents, "two votes in one ballot"),
        (vote_in_an_older_ballot, "older ballot after a newer one"),
        (contribution_counted_again, "in slot 2 counted again in version 4"),
        (one_peer_counted_twice, "counts a peer twice"),
        (contribution_without_commitment, "that peer-b did not commit to"),
    ],
)
def test_every_violation_is_found(spoil: Callable[[Logs], None], what: str) -> None:
    logs = sound()
    spoil(logs)
    assert any(what in violation for violation in violations(logs)), violations(logs)


def test_logs_are_read_over_rotation_and_a_cut_line(tmp_path: Path) -> None:
    logs = sound()
    for peer, events in logs.items():
        (tmp_path / peer).mkdir()
        lines = [json.dumps(event) + "\n" for event in events]
        (tmp_path / peer / "events.old").write_text("".join(lines[:3]))
        (tmp_path / peer / "events.jsonl").write_text("".join(lines[3:]) + '{"event": "ver')
    [verdict] = check_logs(tmp_path)
    assert (verdict.num_certificates, verdict.num_adopted, verdict.num_votes) == (3, 9, 6)
    with (tmp_path / "peer-c" / "events.jsonl").open("a") as log:
        log.write("\n" + json.dumps(version(3)) + "\n")
    with pytest.raises(AssertionError, match="from version 3 to 3"):
        check_logs(tmp_path)
    (tmp_path / "peer-c" / "events.jsonl").unlink()  # every test's own logs are checked at its end
