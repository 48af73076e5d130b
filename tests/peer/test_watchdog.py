from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from peer.watchdog import (
    CHECK_SECONDS,
    MAX_GREETED,
    MAX_RESTARTS,
    REJOIN_SECONDS,
    RESTARTS_SECONDS,
    WELL_SECONDS,
    Watchdog,
    strangers,
)
from tests.virtual_clock import run_virtual

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


class SleepySwarm:
    """Whose p2pd answers soon after this machine was asleep, or never."""

    peer_id = "us"

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


class MortalPeer:
    """The daemon, the swarm and the transport of a peer whose p2pd lives for so long each time."""

    config = None
    p2p = None
    peer_id = "us"
    neighbors = frozenset({"neighbor"})

    def __init__(self, life_seconds: float) -> None:
        self._life_seconds = life_seconds
        self._end_time = 0.0
        self.restart_times: list[float] = []

    @property
    def alive(self) -> bool:
        return asyncio.get_running_loop().time() < self._end_time

    async def wait(self) -> None:
        await asyncio.sleep(max(0.0, self._end_time - asyncio.get_running_loop().time()))

    async def restart(self, _config: None) -> None:
        self.restart_times.append(asyncio.get_running_loop().time())
        self._end_time = self.restart_times[-1] + self._life_seconds

    async def connections(self) -> dict[str, list[str]]:
        return {}

    async def nothing(self, *_: object) -> None:
        """Losing, opening, binding, joining and meeting."""

    lose = reopen = rebind = join = publish_again = meet = nothing


def restart_times(life_seconds: float, *, within: float) -> Sequence[float]:
    async def watch() -> Sequence[float]:
        peer = MortalPeer(life_seconds)
        watchdog = Watchdog(peer, peer, peer)  # type: ignore[arg-type]
        async with watchdog.running():
            await asyncio.sleep(within)
        return peer.restart_times

    return run_virtual(watch())


def test_only_restarts_in_quick_succession_are_limited() -> None:
    times = restart_times(WELL_SECONDS + 2 * CHECK_SECONDS, within=RESTARTS_SECONDS)
    assert len(times) > 2 * MAX_RESTARTS, "each of them worked for a while"
    times = restart_times(WELL_SECONDS / 2, within=RESTARTS_SECONDS - 1)
    assert len(times) == MAX_RESTARTS


class ClumsyPeer(MortalPeer):
    """It never gets back into the swarm, for a reason that nobody thought of."""

    async def join(self, *_: object) -> None:
        raise ArithmeticError("a bug")


def test_an_unexpected_error_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, dict[str, object]]] = []

    async def watch() -> int:
        peer = ClumsyPeer(WELL_SECONDS + 2 * CHECK_SECONDS)
        watchdog = Watchdog(peer, peer, peer)  # type: ignore[arg-type]
        watchdog.report = lambda event, **fields: seen.append((event, fields))
        async with watchdog.running():
            await asyncio.sleep(RESTARTS_SECONDS)
        return len(peer.restart_times)

    assert run_virtual(watch()) > 2 * MAX_RESTARTS
    assert seen[0] == ("error", {"where": "watch over p2pd", "why": "ArithmeticError('a bug')"})
    assert "a bug" in caplog.text


def test_only_other_dht_nodes_are_missing() -> None:
    maddrs = ["/ip4/1.1.1.1/tcp/1/p2p/A", "/ip4/1.1.1.1/tcp/1/p2p/R/p2p-circuit/p2p/B"]
    assert strangers([*maddrs, "/dns/x/tcp/1/p2p/C"], {"C"}) == maddrs[:1]


class DividedPeer(MortalPeer):
    """It knows one of many DHT nodes, and the others take their time."""

    def __init__(self) -> None:
        super().__init__(WELL_SECONDS)
        self.greeted: list[list[str]] = []

    async def meet(self, maddrs: list[str]) -> None:
        self.greeted.append(maddrs)
        await asyncio.sleep(REJOIN_SECONDS)


def test_all_who_are_missing_have_their_turn_while_p2pd_is_watched() -> None:
    maddrs = [f"/ip4/9.9.9.9/tcp/1/p2p/{n}" for n in ("neighbor", *range(3 * MAX_GREETED))]

    async def watch() -> DividedPeer:
        peer = DividedPeer()
        watchdog = Watchdog(peer, peer, peer, known_maddrs=lambda: maddrs)  # type: ignore[arg-type]
        async with watchdog.running():
            await asyncio.sleep(30 * REJOIN_SECONDS)
        return peer

    peer = run_virtual(watch())
    assert {maddr for greeted in peer.greeted for maddr in greeted} == set(maddrs[1:])
    assert all(len(greeted) == MAX_GREETED for greeted in peer.greeted)
    assert len(peer.restart_times) > MAX_RESTARTS
