"""Fixtures for tests under a virtual clock."""

import pytest
import torch

from tests.tiny_run import start, text_files, tiny

__all__ = ["start", "text_files", "tiny"]


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread; and no waiting for the disk, which nothing here cuts the power of."""
    torch.set_num_threads(1)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
