"""What a volunteer sees: a few lines at the start, one per round, and a live line in between.

Everything goes to stderr; stdout is for data. Meaning is never in color alone.
"""

import time
from typing import Any

from rich.console import Console
from rich.text import Text


class Display:
    """Turns a peer's events into lines for a person."""

    def __init__(self, *, quiet: bool = False, verbosity: int = 0) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._verbosity = verbosity
        self._start = time.monotonic()

    def say(self, tag: str, text: str) -> None:
        """One line, with a tag and the time since the start."""
        if not self._quiet:
            elapsed = time.monotonic() - self._start
            line = Text.assemble((f"{elapsed:7.1f} s", "dim"), f" [{tag}] {text}")
            self._console.print(line)

    def introduce(self, **facts: str | list[str]) -> None:
        """What this peer will use, before it uses it."""
        for name, value in facts.items():
            for line in [value] if isinstance(value, str) else value:
                self.say(name, line)

    def show(self, entry: dict[str, Any]) -> None:
        """An event of the peer; those not worth a line are shown only with `-v`."""
        line = describe(entry)
        if line is not None:
            self.say(*line)
        elif self._verbosity:
            details = {k: v for k, v in entry.items() if k not in ("time", "event")}
            self.say(entry["event"], " ".join(f"{key}={value}" for key, value in details.items()))


def describe(entry: dict[str, Any]) -> tuple[str, str] | None:
    """(tag, text) of an event that a volunteer wants to read, or None."""
    match entry["event"]:
        case "path":
            how = "continuing" if entry["resumed"] else "training"
            return "path", f"{how} path {entry['path']} from round {entry['round']}"
        case "first step":
            return "train", f"first inner step on path {entry['path']}"
        case "moved":
            return "path", f"moved from path {entry['former']}, which has enough peers"
        case "round":
            return "round", _round_text(entry)
        case "caught up":
            return "module", f"caught up with module {entry['module']} version {entry['version']}"
        case "fork" if entry["lost"]:
            return "module", f"module {entry['module']} had two histories; took the other one"
        case "diverged":
            return "module", f"module {entry['module']}: own result differed from the certified one"
        case "path not to be had":
            return "path", f"path {entry['path']} cannot be had: {entry['why']}"
        case "error":
            return "error", f"{entry['where']}: {entry['why']}"
        case _:
            return None


def _round_text(entry: dict[str, Any]) -> str:
    loss = "  -  " if entry["loss"] is None else f"{entry['loss']:.3f}"
    return (
        f"{entry['round']:4d}  path {entry['path']}  loss {loss}  "
        f"perplexity {entry['perplexity']:.1f}  {entry['tokens_per_second']:,} tok/s  "
        f"training {entry['inner_share']:.0%}  "
        f"sent {entry['sent_bytes'] / 2**20:.1f} MiB  "
        f"received {entry['received_bytes'] / 2**20:.1f} MiB"
    )
