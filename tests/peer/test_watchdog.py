from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from peer.watchdog import Watchdog

if TYPE_CHECKING:
    import pytest


class SleepySwarm:
    """Whose p2pd answers soon after this machine was asleep, or never."""

    def __init__(self, *, answers: bool) -> None:
        self._answers = answers

    async def connections(self) -> dict[str, list[str]]:
        time.sleep(0.3)  # noqa: ASYNC251 - the whole process stands still
        await asyncio.sleep(0.02 if self._answers else 3600)
        return {}


def test_its_own_sleep_is_not_taken_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.watchdog.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("peer.watchdog.TURN_SECONDS", 0.05)

    def is_well(*, answers: bool) -> bool:
        swarm = SleepySwarm(answers=answers)
        watchdog = Watchdog(None, swarm, None)  # type: ignore[arg-type]
        return asyncio.run(watchdog._answers())

    assert is_well(answers=True)
    assert not is_well(answers=False)
