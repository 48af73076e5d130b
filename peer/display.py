"""What a person sees of a peer: a few lines at the start, one per round, and what goes wrong.

Everything goes to stderr; stdout is for data. Meaning is never in color alone.
"""

import time
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text


class _Stream:
    """`stream`, as far as it can be written; what it does not take is lost.

    rich would try that again and again, and end the process where a pipe has lost its reader.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class Display:
    """Turns a peer's events into lines for a person.

    A peer goes on where they cannot be shown: behind a full disk, or once the terminal is closed.
    """

    def __init__(self, *, quiet: bool = False, verbosity: int = 0) -> None:
        stream = cast("IO[str]", _Stream(Console(stderr=True).file))
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._verbosity = verbosity
        self._start = time.monotonic()

    def say(self, tag: str, text: str, *, is_error: bool = False) -> None:
        """One line, with a tag and the time since the start; if quiet, of errors only."""
        if is_error or not self._quiet:
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
            self.say(*line, is_error=entry["event"] in _ERRORS)
        elif self._verbosity:
            details = {k: v for k, v in entry.items() if k not in ("time", "event")}
            self.say(entry["event"], " ".join(f"{key}={value}" for key, value in details.items()))


_LINES = {
    "first step": ("train", "first inner step on path {path}"),
    "training diverged": ("train", "path {path} diverged; starting over from the swarm's versions"),
    "moved": ("path", "moved from path {former}: path {path} needs it more"),
    "catch-up cut short": (
        "module",
        "module {module}: {version} of {of} versions' certificates are here; going on with that",
    ),
    "waiting for modules": ("path", "trying again in {seconds:.0f} s"),
    "caught up": ("module", "caught up with module {module} version {version}"),
    "diverged": ("module", "module {module}: own result differed from the certified one"),
    "path not to be had": ("path", "path {path} cannot be had: {why}"),
    "manifest": ("run", "version {version} of the manifest, in force from slot {first_slot} on"),
    "manifest in force": ("run", "training by version {version} of the manifest"),
    "growing": ("run", "growing to levels {levels}"),
    "growth refused": ("run", "cannot grow to levels {levels}: {why}"),
    "scores missing": ("run", "nobody has scored the router data yet for paths {paths}"),
    "resharding": ("run", "sharding the corpus anew, for phase {phase}"),
    "issued": (
        "run",
        "signed version {version} of the manifest, in force from slot {first_slot} on",
    ),
    "reachability": ("network", "{text}"),
    "p2pd restarted": ("network", "p2pd was restarted, since {why}; back after {seconds:.1f} s"),
    "p2pd not restarted": ("network", "p2pd could not be restarted: {why}"),
    "p2pd keeps failing": ("network", "p2pd keeps failing; next attempt in {wait_seconds} s"),
    "duties declined": ("disk", "kept for others as far as the limit allows; not: {modules}"),
    "waiting": ("run", "slot 0 begins in {seconds:.0f} s"),
    "not counted": ("round", "nothing trained here was counted for {slots} rounds: {why}"),
    "clock set back": ("clock", "it was ahead and has been set right; going on in slot {slot}"),
    "error": ("error", "{where}: {why}"),
}
_ERRORS = {
    "error",
    "growth refused",
    "not counted",
    "p2pd keeps failing",
    "p2pd not restarted",
    "p2pd restarted",
    "scores missing",
}


def describe(entry: dict[str, Any]) -> tuple[str, str] | None:
    """(tag, text) of an event that a person wants to read, or None."""
    match entry["event"]:
        case "path":
            how = "continuing" if entry["resumed"] else "training"
            return "path", f"{how} path {entry['path']} from round {entry['round']}"
        case "round":
            return "round", _round_text(entry)
        case "fork" if entry["lost"]:
            return "module", f"module {entry['module']} had two histories; took the other one"
        case event if event in _LINES:
            tag, text = _LINES[event]
            return tag, text.format(**{name: _plain(value) for name, value in entry.items()})
        case _:
            return None


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _round_text(entry: dict[str, Any]) -> str:
    loss = "  -  " if entry["loss"] is None else f"{entry['loss']:.3f}"
    return (
        f"{entry['round']:4d}  path {entry['path']}  loss {loss}  "
        f"perplexity {entry['perplexity']:.1f}  {entry['tokens_per_second']:,} tok/s  "
        f"training {entry['inner_share']:.0%}  "
        f"sent {entry['sent_bytes'] / 2**20:.1f} MiB  "
        f"received {entry['received_bytes'] / 2**20:.1f} MiB"
    )
