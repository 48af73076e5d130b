"""A sample of the kill matrix (`make faults`): real processes, real signals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cells import matrix, sample
from tests.faults.swarm import FaultSwarm

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
