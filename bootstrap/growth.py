"""Asking the node that serves a run to let it grow: a file in the run's directory.

`dipaco-bootstrap grow` writes it, and `serve`, running or started later, acts on it.
"""

import json
from pathlib import Path

from dipaco.checkpoint import write_atomically

GROWTH_FILE = "growth.json"


def request_growth(directory: Path, levels: tuple[int, ...]) -> None:
    """Ask for `levels`, in place of what was asked for before."""
    write_atomically(directory / GROWTH_FILE, json.dumps({"levels": levels}).encode())


def requested_growth(directory: Path) -> tuple[int, ...] | None:
    """What was asked for, or None."""
    try:
        levels = json.loads((directory / GROWTH_FILE).read_text())["levels"]
        return tuple(int(num_experts) for num_experts in levels)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def forget_growth(directory: Path, levels: tuple[int, ...]) -> None:
    """These are there, or cannot be; what was asked for meanwhile stays asked for."""
    if requested_growth(directory) == levels:
        (directory / GROWTH_FILE).unlink(missing_ok=True)
