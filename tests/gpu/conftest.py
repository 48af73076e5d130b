"""The fixtures of the tiny run; nothing here runs without a GPU."""

from pathlib import Path

import pytest
import torch

from tests.tiny_run import small_footprint, start, text_files, tiny

__all__ = ["small_footprint", "start", "text_files", "tiny"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
