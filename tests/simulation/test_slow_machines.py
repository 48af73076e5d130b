"""Machines on which what goes on beside training takes longer than a slot: nothing piles up."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dipaco.config import TopologyConfig
from peer.draft import Draft
from peer.path_work import PathWork
from tests.lab import Device, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds


class Slowly:
    """Lets every call of a method take longer than a slot, and tells how many ran at once."""

    def __init__(self, patch: pytest.MonkeyPatch, method: Callable[..., object]) -> None:
        self.most_at_once = 0
        self._num_running = 0
        self._method = method
        self._offload = Device.offload
        patch.setattr(Device, "offload", lambda *arguments: self._run(*arguments))

    async def _run(self, device: Device, function: Callable[[], object]) -> object:
        result = await self._offload(device, function)
        if getattr(function, "__func__", None) is self._method:
            self._num_running += 1
            self.most_at_once = max(self.most_at_once, self._num_running)
            await asyncio.sleep(1.25 * ROUND)
            self._num_running -= 1
        return result


def test_who_encodes_for_longer_than_a_slot_encodes_one_outer_gradient_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else copies pile up, and what is dropped of them has no blob to be told by if it is counted:
    all of its progress would stay on top, to be counted once more.
    """
    encoding = Slowly(monkeypatch, Draft.encode)

    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer", step_seconds=4.0)
            await asyncio.sleep(10 * ROUND)
            slots = [entry["slot"] for entry in peer.seen("contributed")]
            assert len(slots) >= 3
            assert encoding.most_at_once == 1
            modules = len(place.run.manifest.topology.modules)
            committed = [entry["slot"] for entry in peer.seen("committed")]
            assert committed == sorted(slots * modules)[: len(committed)]
            assert len(committed) >= 2 * modules

    run_virtual(scenario())


def test_where_evaluating_takes_longer_than_a_round_the_last_one_is_evaluated_and_all_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], PathWork.save
    monkeypatch.setattr(PathWork, "save", lambda work: (saved.append(work.round), save(work)))
    evaluating = Slowly(monkeypatch, PathWork.evaluate)

    async def scenario() -> None:
        config = replace(
            little_config(num_rounds=8, blocking=False), topology=TopologyConfig(levels=(1,))
        )
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            await place.until(lambda: bool(peer.seen("finished")), within=20 * ROUND, what="an end")
            rounds = [entry["round"] for entry in peer.seen("round")]
            assert rounds[-1] == 8
            assert rounds == sorted(set(rounds))
            assert len(rounds) < 8, "the fault: every round was evaluated in time"
            assert evaluating.most_at_once == 1
            assert len(saved) >= 7, "once a slot"

    run_virtual(scenario())
