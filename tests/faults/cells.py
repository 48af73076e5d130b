"""The kill matrix: which fault befalls whom, at which stage of a round, in which role."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What the peer that reaches the stage is to the module in question."""

    TRAINER = "trainer"  # of a path through it; another peer leads
    LEADER = "leader"
    KEEPER = "keeper"  # holds it without training it; another peer leads


class Target(StrEnum):
    """What is hit when the stage is reached."""

    PEER = "peer"
    P2PD = "p2pd"
    BOOTSTRAP = "bootstrap node"
    MACHINE = "machine"  # the peer and its p2pd at once: a laptop that is shut


STAGES = {  # as the matrix calls it: the event that is written when it begins
    "training": "training",
    "committing": "committed",
    "pulling": "pulling",
    "proposing": "proposing",
    "reducing": "reducing",
    "voting": "voted",
    "publishing": "publishing",
}
STAGES_OF = {
    Role.TRAINER: ("training", "committing", "pulling", "reducing", "voting"),
    Role.LEADER: ("proposing", "reducing", "voting", "publishing"),
    Role.KEEPER: ("pulling", "reducing", "voting"),
}
STOP_SLOTS = 1.2  # how long a stopped process stays so: over the end of a slot at least
LONG_STOP_SLOTS = 2.2


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fault."""

    signal: signal.Signals
    target: Target
    role: Role
    stage: str
    stop_slots: float = STOP_SLOTS

    @property
    def kills(self) -> bool:
        return self.signal == signal.SIGKILL

    def __str__(self) -> str:
        stop = "" if self.kills else f" for {self.stop_slots} slots"
        return f"{self.signal.name} of {self.target}{stop}, {self.role} {self.stage}"


def matrix() -> Iterator[Cell]:
    """All cells that make sense.

    The bootstrap node is hit once per stage, whoever reaches it: it has the same part in all.
    """
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for target in (Target.PEER, Target.P2PD):
            for role, stages in STAGES_OF.items():
                for stage in stages:
                    yield Cell(signal=number, target=target, role=role, stage=stage)
        for stage in STAGES:
            role = next(role for role in Role if stage in STAGES_OF[role])
            yield Cell(signal=number, target=Target.BOOTSTRAP, role=role, stage=stage)
    for role, stage in ((Role.TRAINER, "voting"), (Role.LEADER, "publishing")):
        yield Cell(
            signal=signal.SIGSTOP,
            target=Target.MACHINE,
            role=role,
            stage=stage,
            stop_slots=LONG_STOP_SLOTS,
        )


def sample() -> list[Cell]:
    """Those of `make test`: the leader dies alone with the news, a laptop sleeps on its vote."""
    return [
        Cell(signal=signal.SIGKILL, target=Target.PEER, role=Role.LEADER, stage="publishing"),
        Cell(
            signal=signal.SIGSTOP,
            target=Target.MACHINE,
            role=Role.TRAINER,
            stage="voting",
            stop_slots=LONG_STOP_SLOTS,
        ),
    ]
