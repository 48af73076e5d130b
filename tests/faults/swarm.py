"""One swarm of real processes that lives through many faults, and what is asserted of each.

A fault is judged by the peers' event logs and the certificates on their disks, never by what this
process believes to have happened.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from dht.errors import SwarmError
from dht.identity import Identity
from dipaco.config import RunConfig
from dipaco.digest import blob_digest
from dipaco.topology import ModuleID
from peer.certificate import check_chain
from peer.manifest import Manifest, Origin
from peer.messages import Certificate
from tests.faults.cells import STAGES, Cell, Role, Target
from tests.faults.peer_process import (
    BLOBS_DIR,
    MANIFEST_DIR,
    PeerProcess,
    bootstrap_node,
    volunteer,
    warm_up,
)
from tests.history_checker import Event, check
from tests.little_run import little_config, make_run

SLOT_SECONDS = 3.0
START_IN_SECONDS = 6.0
START_SECONDS = 120.0  # within which every volunteer has contributed, and has versions
FIRE_SLOTS = 12  # within which the stage is reached
RECOVER_SLOTS = 6  # within which every module concerned has its next version: the stated timeout
HEAL_SLOTS = 10  # within which who was killed is back, with the versions of then
WAKE_SLOTS = 3  # within which who was stopped is: two rounds after the one in which it wakes
DEATH_SECONDS = 5.0  # within which p2pd is gone after its peer


class FaultError(AssertionError):
    """A cell of the matrix did not end as promised."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault did."""

    cell: Cell
    victim: str
    module: str = ""  # that the stage was reached for; none for training
    modules: tuple[str, ...] = ()  # that had to go on: of the victim's path, and that one
    recover_seconds: float | None = None  # until the last of them had its next version
    recover_slots: int | None = None
    heal_seconds: float | None = None  # until whom it befell was back, from when that could begin
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that has happened."""

    cell: Cell
    victim: PeerProcess  # which reached the stage
    hit: PeerProcess  # whom, or whose p2pd, the signal was sent to
    pids: list[int]  # that got it
    p2pd: int  # of whom it befell
    entry: Event  # of the victim's log, when it happened
    modules: tuple[str, ...]
    before: dict[str, int]  # the survivors' newest versions then

    @property
    def time(self) -> float:
        return float(self.entry["time"])


class FaultSwarm:
    """A bootstrap node and a volunteer for each path, one process and one p2pd each."""

    def __init__(
        self, directory: Path, *, levels: tuple[int, ...], slot_seconds: float = SLOT_SECONDS
    ) -> None:
        config = little_config(
            num_rounds=100_000,
            round_seconds=slot_seconds,
            inner_steps=20,
            blocking=False,
            wire_format="int8",
        )
        config = replace(config, topology=replace(config.topology, levels=levels))
        warm_up()
        self._slot_seconds = slot_seconds
        self.manifest = _write_run(directory / "run", config)
        self.bootstrap = PeerProcess("bootstrap", directory / "run", bootstrap_node)
        self.volunteers = [
            PeerProcess(f"peer{n}", directory / f"peer{n}", volunteer)
            for n in range(math.prod(levels))
        ]
        self._turns = 0

    @property
    def everyone(self) -> list[PeerProcess]:
        return [self.bootstrap, *self.volunteers]

    def start(self) -> None:
        """Start everyone, and wait until whatever is trained has a version."""
        self.bootstrap.start()
        self._until(self.bootstrap.address_file.exists, 30.0, "a bootstrap node")
        for peer in self.volunteers:
            peer.start([self.bootstrap.address])
        self._until(
            lambda: all(_is_training(p, {}) and p.path_modules() for p in self.volunteers),
            START_SECONDS,
            "a first contribution and version of every volunteer",
        )

    def run(self, cell: Cell) -> Outcome:
        """Let the fault happen, and see it through; the swarm is whole again afterwards."""
        victim = self._next_victim(cell.role)
        hit = self.bootstrap if cell.target == Target.BOOTSTRAP else victim
        outcome = Outcome(cell=cell, victim=victim.name)
        try:
            fault = self._provoke(cell, victim, hit)
            outcome = replace(outcome, module=fault.entry.get("module", ""), modules=fault.modules)
            outcome = self._recover(fault, outcome)
            outcome = self._heal(fault, outcome)
            self._check(fault)
        except (FaultError, SwarmError) as error:
            outcome = replace(outcome, failure=str(error))
            victim.disarm()
            self._replace(hit)
        return outcome

    def close(self) -> None:
        """Let everyone leave; FaultError if someone does not, or leaves a process behind."""
        for peer in self.everyone:
            peer.ask_to_leave()
        late = [peer.name for peer in self.everyone if not peer.leave()]
        if late:
            raise FaultError(f"did not leave when asked to: {', '.join(late)}")
        left = [child for child in psutil.Process().children(recursive=True)
                if child.name() == "p2pd" and child.status() != psutil.STATUS_ZOMBIE]  # fmt: skip
        if left:
            raise FaultError(f"left behind: {left}")

    def kill(self) -> None:
        """End everyone, after something went wrong."""
        for peer in self.everyone:
            peer.kill()

    def slot(self, now: float) -> int:
        return self.manifest.slot_at(now)

    def _next_victim(self, role: Role) -> PeerProcess:
        """Volunteers in turn; one that keeps a module it does not train where that is the role."""
        for _ in self.volunteers:
            victim = self.volunteers[self._turns % len(self.volunteers)]
            self._turns += 1
            if role != Role.KEEPER or set(victim.versions()) - set(victim.path_modules()):
                break
        return victim

    def _provoke(self, cell: Cell, victim: PeerProcess, hit: PeerProcess) -> Fault:
        """Set the trap, and wait until it is sprung."""
        self._until(
            lambda: bool(self._trained_beside(hit) & {*victim.path_modules()}),
            HEAL_SLOTS * self._slot_seconds,
            "somebody to train beside the victim",
        )
        p2pd = hit.p2pd.pid
        pids = {
            Target.P2PD: [p2pd],
            Target.MACHINE: [p2pd, hit.pid],
        }.get(cell.target, [hit.pid])
        victim.set_trap(STAGES[cell.stage], cell.role, cell.signal, pids)
        self._until(
            lambda: victim.fired() is not None,
            FIRE_SLOTS * self._slot_seconds,
            f"a moment of {cell.role} {cell.stage}",
        )
        entry = victim.fired() or {}
        survivors = [peer for peer in self.everyone if peer is not hit]
        # What only the victim trained has nobody to go on with it.
        modules = self._trained_beside(hit) & {*victim.path_modules(), entry.get("module", "")}
        fault = Fault(
            cell=cell,
            victim=victim,
            hit=hit,
            pids=pids,
            p2pd=p2pd,
            entry=entry,
            modules=tuple(sorted(modules)),
            before=_newest(survivors, until=entry["time"]),
        )
        self._until(lambda: _has_fallen(fault), DEATH_SECONDS, "the signal's effect", fault)
        if hit is victim and cell.target != Target.P2PD and victim.follow()[-1] != entry:
            raise FaultError(f"the victim went on after {cell.stage}: {victim.follow()[-1]}")
        if not modules:
            raise FaultError("nothing that anybody else trains was concerned")
        return fault

    def _trained_beside(self, hit: PeerProcess) -> set[str]:
        """Modules that others train."""
        others = [peer for peer in self.everyone if peer is not hit]
        return {module for peer in others for module in peer.path_modules()}

    def _recover(self, fault: Fault, outcome: Outcome) -> Outcome:
        """Wait until every module concerned has its next version among the survivors."""
        survivors = [peer for peer in self.everyone if peer is not fault.hit]
        stop_seconds = fault.cell.stop_slots * self._slot_seconds

        def over() -> bool:
            if not fault.cell.kills and time.time() - fault.time > stop_seconds:
                _resume(fault.pids)
            newest = _newest(survivors)
            return all(newest.get(m, 0) > fault.before.get(m, 0) for m in fault.modules)

        self._until(over, RECOVER_SLOTS * self._slot_seconds, "the next versions", fault)
        times = [_time_of(survivors, m, fault.before.get(m, 0) + 1) for m in fault.modules]
        if not fault.cell.kills:
            time.sleep(max(0.0, fault.time + stop_seconds - time.time()))
            _resume(fault.pids)
        return replace(
            outcome,
            recover_seconds=max(times) - fault.time,
            recover_slots=self.slot(max(times)) - self.slot(fault.time),
        )

    def _heal(self, fault: Fault, outcome: Outcome) -> Outcome:
        """Bring back who was killed; wait until whom it befell holds what the others hold."""
        hit, cell = fault.hit, fault.cell
        begin = time.time()
        goal = {m: v for m, v in _newest(self.everyone).items() if m in fault.modules}
        if cell.kills and cell.target != Target.P2PD:
            hit.start_again()
        self._until(
            lambda: hit.is_alive and _is_training(hit, goal, since=begin),
            (HEAL_SLOTS if cell.kills else WAKE_SLOTS) * self._slot_seconds,
            f"{hit.name} to be back",
        )
        return replace(outcome, heal_seconds=time.time() - begin)

    def _check(self, fault: Fault) -> None:
        """The whole history so far by the logs, and the certificates on the survivors' disks."""
        verdict = check([peer.history() for peer in self.everyone])
        if verdict.violations or not verdict.num_certificates:
            raise FaultError("; ".join(verdict.violations[:3]) or "no certificate at all")
        for peer in self.everyone:
            for module in fault.modules:
                if peer.versions().get(module, 0) > 0:
                    self._check_certificates(peer, module)

    def _check_certificates(self, peer: PeerProcess, module: str) -> None:
        """All signatures, quorums and links, from the manifest on. Raises `BadMessage`."""
        [directory] = peer.state_dir.glob(f"runs/*/modules/{module}")
        files = sorted(directory.glob("*.json"))
        chain = [Certificate.from_bytes(file.read_bytes(), sender=peer.name) for file in files]
        start = self.manifest.starts[ModuleID.parse(module).level]
        origin = Origin(version=0, state=start)
        check_chain(chain, None, origin=origin, slot=self.slot(time.time()), sender=peer.name)

    def _replace(self, peer: PeerProcess) -> None:
        """After a failure: put another process in its place, for the next fault to find a swarm."""
        peer.kill()
        peer.start([other.address for other in self.everyone if other is not peer])
        begin = time.time()
        self._until(
            lambda: _is_training(peer, {}, since=begin),
            HEAL_SLOTS * self._slot_seconds,
            f"{peer.name} to be replaced",
        )

    def _until(
        self,
        condition: Callable[[], bool],
        within: float,
        what: str,
        fault: Fault | None = None,
    ) -> None:
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                raise FaultError(f"not within {within:.0f} s: {what}")
            for peer in self.everyone:
                if peer.has_died and (fault is None or peer is not fault.hit):
                    raise FaultError(f"{peer.name} ended by itself")
            time.sleep(0.1)


def _write_run(directory: Path, config: RunConfig) -> Manifest:
    """Make a run of random tokens, signed with the key that its bootstrap node will have."""
    for name in (MANIFEST_DIR, BLOBS_DIR):
        (directory / name).mkdir(parents=True)
    operator = Identity.load_or_create(directory / "identity")
    run = make_run(config, operator=operator, start_time=time.time() + START_IN_SECONDS)
    (directory / MANIFEST_DIR / run.digest).write_bytes(run.manifest.to_bytes())
    for blob in run.blobs:
        (directory / BLOBS_DIR / blob_digest(blob)).write_bytes(blob)
    return run.manifest


def _is_training(peer: PeerProcess, goal: dict[str, int], *, since: float = 0.0) -> bool:
    """Whether a peer trains (or, if it never does, attends) and holds `goal` at least."""
    versions = peer.versions()
    recent = [event for event in peer.follow() if event["time"] > since]
    names = {"voted"} if peer.name == "bootstrap" else {"training"}
    return (
        any(event["event"] in names for event in recent)
        and bool(versions)
        and all(versions.get(module, 0) >= version for module, version in goal.items())
    )


def _newest(peers: Sequence[PeerProcess], *, until: float = float("inf")) -> dict[str, int]:
    """The newest version of every module that any of `peers` held at a time."""
    newest: dict[str, int] = {}
    for peer in peers:
        for module, version in peer.versions(until=until).items():
            newest[module] = max(version, newest.get(module, 0))
    return newest


def _time_of(peers: Sequence[PeerProcess], module: str, version: int) -> float:
    """When the first of `peers` held at least `version`."""
    return min(
        event["time"]
        for peer in peers
        for event in peer.follow()
        if event["event"] in ("version", "caught up")
        and event["module"] == module
        and event["version"] >= version
    )


def _has_fallen(fault: Fault) -> bool:
    """Whether those that got the signal are dead or stopped, and p2pd is gone with its peer."""
    pids = [*fault.pids, fault.p2pd] if fault.cell.kills else fault.pids
    dead = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    wanted = dead if fault.cell.kills else (psutil.STATUS_STOPPED,)
    return all(_status(pid) in wanted for pid in pids)


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


def _resume(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
