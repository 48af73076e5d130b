"""A sample of the kill matrix (`make faults`): real processes, real signals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.faults import __main__ as program
from tests.faults.cells import Cell, matrix, sample
from tests.faults.swarm import FaultSwarm, Outcome

SLOT_SECONDS = 3.0
MAX_STRETCH = 4.0  # of a slot, on a machine that has more to do than it has cores for


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[FaultSwarm]:
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    stretch = min(MAX_STRETCH, max(1.0, busy))
    swarm = FaultSwarm(tmp_path, levels=(2, 1), slot_seconds=stretch * SLOT_SECONDS)
    try:
        swarm.start()
        yield swarm
        swarm.close()
    finally:
        swarm.kill()


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_a_swarm_lives_through_a_sample_of_the_kill_matrix(swarm: FaultSwarm) -> None:
    for cell in sample():
        outcome = swarm.run(cell)
        assert not outcome.failure, f"{cell}: {outcome.failure}"
        assert outcome.modules


def test_the_matrix_has_every_fault_once() -> None:
    cells = [str(cell) for cell in matrix()]
    assert len(set(cells)) == len(cells)
    assert {str(cell) for cell in matrix() if cell in sample()} == {str(c) for c in sample()}


def test_the_matrix_can_be_run_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the file is not run again, and the table shows every fault once."""
    ran: list[Cell] = []

    def run_cells(cells: Sequence[Cell], note: Callable[[Outcome], None], **_: object) -> str:
        ran.extend(cells)
        for cell in cells:
            outcome = Outcome(cell=cell, victim="peer0", recover_slots=1)
            note(replace(outcome, recover_seconds=1.0, heal_seconds=2.0))
        return ""

    monkeypatch.setattr(program, "run_cells", run_cells)
    arguments = ["--no-averager", "--json", str(tmp_path / "figures.json"), "--markdown"]
    for limit in ([f"--limit={number}"] for number in (10, 0, 20)):
        assert CliRunner().invoke(program.main, arguments + limit).exit_code == 0
    result = CliRunner().invoke(program.main, arguments)
    assert result.exit_code == 0
    assert ran == list(matrix())
    assert result.output.count("1.0 / 2.0") == len(ran)
