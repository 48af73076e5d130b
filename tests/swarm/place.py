"""Real `dipaco-peer` and `dipaco-bootstrap` processes that take part in one prepared run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bootstrap.prepare import prepare_run
from dipaco.config import RunConfig

BIN = Path(sys.executable).parent
LOOPBACK = ["--host-maddr", "/ip4/127.0.0.1/tcp/0"]
START_IN_SECONDS = 15  # most of what four processes need to start on two cores; late ones join late


@dataclass
class Process:
    """A `dipaco-peer` or `dipaco-bootstrap` process and what it has logged."""

    state_dir: Path
    popen: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)

    def seen(self, event: str) -> list[dict[str, Any]]:
        self.events.clear()
        for file in sorted(self.state_dir.glob("runs/*/events.jsonl")):
            lines = file.read_text().splitlines(keepends=True)
            self.events += [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in self.events if entry["event"] == event]

    @property
    def address(self) -> str:
        return (self.state_dir / "address").read_text().split()[-1]

    @property
    def log(self) -> str:
        return self.state_dir.with_suffix(".log").read_text()

    def leave(self) -> int:
        self.popen.send_signal(signal.SIGINT)
        return self.popen.wait(timeout=30)


class Place:
    """A prepared run and the processes that take part in it."""

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self.directory = directory
        self.start = prepare_run(config, directory / "run", lambda stage, done, total: None)
        self.processes: list[Process] = []

    def serve(self) -> Process:
        arguments = ["serve", str(self.directory / "run"), "--start-in", str(START_IN_SECONDS)]
        process = self._launch("dipaco-bootstrap", arguments, self.directory / "run")
        self.until(lambda: (self.directory / "run" / "address").exists(), within=60)
        return process

    def join(self, name: str, *arguments: str) -> Process:
        state_dir = self.directory / name
        state_dir.mkdir(exist_ok=True)
        options = ["--state-dir", str(state_dir), "--threads", "1"]
        return self._launch("dipaco-peer", ["join", *arguments, *options], state_dir)

    def until(self, condition: Callable[[], Any], *, within: float) -> None:
        """Wait for an event of the processes; fails with their logs."""
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail("\n".join(p.log for p in self.processes if p.popen.poll() is None))
            time.sleep(0.1)

    def _launch(self, command: str, arguments: list[str], state_dir: Path) -> Process:
        with state_dir.with_suffix(".log").open("ab") as log:
            popen = subprocess.Popen(
                [str(BIN / command), *arguments, *LOOPBACK, "-vv"], stdout=log, stderr=log
            )
        self.processes.append(Process(state_dir, popen))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
