"""Checks, from the peers' event logs alone, that a run's history is one that the promises allow.

A pure function over what each peer says it did. It uses none of the code that it judges, and only
knows the promises: a version is applied with a certificate, a certificate needs a majority of
votes, a vote is cast once, and a peer that was killed goes on where its disk says.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

Event = dict[str, Any]
LOG_NAME = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class History:
    """What one peer logged of one run, oldest event first, over all its restarts."""

    run: str
    peer: str
    events: Sequence[Event]

    def of(self, *names: str) -> Iterator[Event]:
        return (event for event in self.events if event["event"] in names)

    def adopted(self) -> Iterator[Event]:
        """Each time that the peer said which certified version it holds now."""
        for event in self.of("version", "caught up", "resumed"):
            if event.get("certificate"):  # not a module as the manifest gave it
                yield event

    def __str__(self) -> str:
        return self.peer[-6:]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How much was looked at, and what is wrong with it."""

    num_certificates: int
    num_adopted: int
    num_votes: int
    violations: tuple[str, ...]


def check(histories: Sequence[History]) -> Verdict:
    """Check the histories of the peers of one run against one another.

    What those say whose history is missing is believed; about all others it must agree.
    """
    adopted = [event for history in histories for event in history.adopted()]
    certificates = {event["certificate"]: event for event in adopted}
    violations = [
        *_different_results(histories),
        *_doubled_certificates(certificates),
        *_uncertified(adopted, histories),
        *_doubled_contributions(certificates),
        *_uncommitted_contributions(certificates, histories),
    ]
    for history in histories:
        violations += _steps_back(history)
        violations += _doubled_votes(history)
    return Verdict(
        num_certificates=len(certificates),
        num_adopted=len(adopted),
        num_votes=sum(1 for history in histories for _ in history.of("voted")),
        violations=tuple(dict.fromkeys(violations)),
    )


def _different_results(histories: Sequence[History]) -> Iterator[str]:
    """Peers that made different bytes of the same thing."""
    states: dict[str, dict[str, History]] = defaultdict(dict)
    for history in histories:
        for event in history.of("diverged"):
            yield f"{history} computed another state than certified: {event}"
        for event in (*history.of("voted"), *history.adopted()):
            name = f"module {event['module']} version {event['version']}"
            states[f"{name}, proposal {event['proposal'][:12]}"][event["state"]] = history
    for what, by_state in states.items():
        if len(by_state) > 1:
            yield f"{what}: different states at {', '.join(map(str, by_state.values()))}"


def _doubled_certificates(certificates: Mapping[str, Event]) -> Iterator[str]:
    """Versions with two certificates of rosters that were not made from the announcements.

    Only one that was can begin another history; then the fixed rule settles it, some versions on.
    """
    by_version: dict[tuple[str, int], list[Event]] = defaultdict(list)
    for certificate in certificates.values():
        if not certificate["rebuilt"]:
            by_version[certificate["module"], certificate["version"]].append(certificate)
    for (module, version), same in by_version.items():
        if not all(_may_stand_beside(*pair, certificates) for pair in combinations(same, 2)):
            yield f"module {module} version {version} has two certificates"


def _may_stand_beside(one: Event, other: Event, certificates: Mapping[str, Event]) -> bool:
    """Whether the logs show that a roster was rebuilt since these two histories parted."""
    while one["parent"] != other["parent"]:
        ours, theirs = certificates.get(one["parent"]), certificates.get(other["parent"])
        if ours is None or theirs is None:
            return False
        if ours["rebuilt"] or theirs["rebuilt"]:
            return True
        one, other = ours, theirs
    return False


def _uncertified(adopted: Iterable[Event], histories: Sequence[History]) -> Iterator[str]:
    """Versions applied without a majority, or with votes that their voters know nothing of."""
    cast = {(h.peer, _ballot(event)) for h in histories for event in h.of("voted")}
    known = {history.peer for history in histories}
    for event in adopted:
        name, voters = f"module {event['module']} version {event['version']}", set(event["voters"])
        if len(voters) < event["roster"] // 2 + 1:
            yield f"{name} was applied with {len(voters)} votes, roster of {event['roster']}"
        for voter in sorted(voters & known):
            if (voter, _ballot(event)) not in cast:
                yield f"{name} was applied with a vote that {voter[-6:]} did not cast"


def _doubled_contributions(certificates: Mapping[str, Event]) -> Iterator[str]:
    """Contributions that count twice in one history of a module."""
    counted: dict[tuple[str, int, str], list[Event]] = defaultdict(list)
    for certificate in certificates.values():
        name = f"module {certificate['module']} version {certificate['version']}"
        if len(set(certificate["contributors"])) < len(certificate["contributors"]):
            yield f"{name} counts a peer twice"
        for peer in set(certificate["contributors"]):
            key = (certificate["module"], certificate["trained_slot"], peer)
            counted[key].append(certificate)
    for (module, slot, peer), versions in counted.items():
        for later in versions:
            if any(_continues(later, earlier, certificates) for earlier in versions):
                yield (
                    f"the contribution of {peer[-6:]} to module {module} in slot {slot} counted "
                    f"again in version {later['version']}"
                )


def _continues(later: Event, earlier: Event, certificates: Mapping[str, Event]) -> bool:
    """Whether `earlier` is an ancestor of `later`, as far as the logs know the way back."""
    step = certificates.get(later["parent"])
    while step is not None and step["version"] > earlier["version"]:
        step = certificates.get(step["parent"])
    return step is earlier


def _uncommitted_contributions(
    certificates: Mapping[str, Event], histories: Sequence[History]
) -> Iterator[str]:
    """Contributions that their peer never committed to."""
    committed = {
        (h.peer, event["module"], event["slot"], event["base_version"])
        for h in histories
        for event in h.of("committed")
    }
    known = {history.peer for history in histories}
    for certificate in certificates.values():
        module, version = certificate["module"], certificate["version"]
        for peer in sorted(known & set(certificate["contributors"])):
            if (peer, module, certificate["trained_slot"], version - 1) not in committed:
                yield (
                    f"module {module} version {version} counts a contribution that {peer[-6:]} "
                    "did not commit to"
                )


def _steps_back(history: History) -> Iterator[str]:
    """Versions that did not grow, and versions put on something else than they continue."""
    held: dict[str, Event] = {}
    lost: set[str] = set()  # modules whose history was found to be the worse one of two
    for event in history.of("fork", "dropped", "resumed", "version", "caught up"):
        module = event["module"]
        if event["event"] == "fork":
            lost |= {module} if event["lost"] else set()
        elif event["event"] == "dropped":
            held.pop(module, None)
        else:
            if module in held and not _may_follow(event, held[module], lost=module in lost):
                yield (
                    f"{history}: module {module} went from version {held[module]['version']} to "
                    f"{event['version']} ({event['event']})"
                )
            held[module] = event
            lost.discard(module)


def _may_follow(now: Event, before: Event, *, lost: bool) -> bool:
    """Whether a peer that held a version may say that it now holds the other one."""
    step = now["version"] - before["version"]
    match now["event"]:
        case "version":
            return step == 1 and before.get("certificate", now["parent"]) == now["parent"]
        case "caught up":
            return step > 0 or (step == 0 and lost)
        case _:  # started again: a kill may come between applying and logging it
            is_same = now.get("certificate") == before.get("certificate")
            return step > 0 or (step == 0 and (is_same or lost))


def _doubled_votes(history: History) -> Iterator[str]:
    """Two votes in one ballot, or a vote in a ballot that an earlier vote has superseded."""
    cast: dict[tuple[Any, ...], Event] = {}  # whatever it continues
    latest: dict[tuple[str, int, str], Event] = {}
    for vote in history.of("voted"):
        version = (vote["module"], vote["version"])
        where = f"{history}: module {vote['module']} version {vote['version']}"
        if _ballot(cast.setdefault((*version, _order(vote)), vote)) != _ballot(vote):
            yield f"{where}: two votes in one ballot"
        before = latest.get((*version, vote["parent"]))
        if before is not None and _order(vote) < _order(before):
            yield f"{where}: voted in an older ballot after a newer one"
        latest[*version, vote["parent"]] = vote


def _order(event: Event) -> tuple[int, int, str]:
    return event["slot"], event["attempt"], event["leader"]


def _ballot(event: Event) -> tuple[Any, ...]:
    return (event["module"], event["proposal"], event["state"], *_order(event))


def read_histories(directory: Path) -> dict[str, list[History]]:
    """All histories in the event logs below `directory`, by run."""
    by_run: dict[str, list[History]] = defaultdict(list)
    for file in sorted(directory.rglob(LOG_NAME)):
        events = [*_read(file.with_suffix(".old")), *_read(file)]
        started = next((event for event in events if event["event"] == "started"), None)
        if started is not None:  # else it never got as far as doing anything
            run, peer = started["run"], started["peer"]
            by_run[run].append(History(run=run, peer=peer, events=events))
    return dict(by_run)


def _read(file: Path) -> Iterator[Event]:
    """The events of a log; a line that SIGKILL cut off is none."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def check_logs(directory: Path) -> list[Verdict]:
    """Check every run that has event logs below `directory`; says what is wrong if it is."""
    verdicts = [check(histories) for histories in read_histories(directory).values()]
    violations = [violation for verdict in verdicts for violation in verdict.violations]
    assert not violations, "the logs show:\n  " + "\n  ".join(violations[:20])
    return verdicts
