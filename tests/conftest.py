"""Fixtures for every test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.history_checker import check_logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# How long an example takes says how busy the machine is.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(autouse=True, scope="session")
def light() -> Iterator[None]:
    """One thread, since tests run side by side; no waiting for disks: nothing cuts their power."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """Commands choose their number of threads: that is not for the tests after them."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def histories_hold(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever peers a test ran: fail it unless their event logs show a sound history."""
    directory: Path | None = None
    if "tmp_path" in request.fixturenames:
        directory = request.getfixturevalue("tmp_path")
    yield
    if directory is not None:
        check_logs(directory)


@pytest.fixture(autouse=True)
def no_p2pd_survives() -> Iterator[None]:
    """Fail a test that leaves a p2pd behind, and end it so that the next test starts clean."""
    yield
    survivors = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and child.name() == "p2pd"
    ]
    for survivor in survivors:
        survivor.kill()
    assert not survivors, f"the test left p2pd processes behind: {survivors}"
