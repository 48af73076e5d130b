"""Real `dipaco-peer` and `dipaco-bootstrap` processes that take part in one prepared run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from bootstrap.prepare import START_DIR, prepare_run
from dipaco.config import RunConfig
from dipaco.start import Start

BIN = Path(sys.executable).parent
LOOPBACK = ["--host-maddr", "/ip4/127.0.0.1/tcp/0"]
START_IN_SECONDS = 5  # less than some processes need on two cores: late ones join late


def prepare(prepared: Start, config: RunConfig, directory: Path) -> Start:
    """A run of `config`, with the stages that it shares with what is prepared already."""
    shutil.copytree(prepared.directory, directory / START_DIR)
    return prepare_run(config, directory, lambda stage, done, total: None)


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

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)


def leave(processes: list[Process]) -> None:
    """Ctrl-C, at once: they say goodbye, and nothing that they started is left."""
    children = [child for process in processes for child in process.children]
    assert len(children) >= len(processes), "a peer has a p2pd"
    # What a terminal does: Ctrl-C goes to the whole foreground process group.
    groups = {os.getpgid(process.popen.pid) for process in processes}
    assert all(os.getpgid(child.pid) not in groups for child in children)
    for process in processes:
        process.popen.send_signal(signal.SIGINT)
    for process in processes:
        assert process.popen.wait(timeout=30) == 0
        assert "left the swarm" in process.log
    assert not psutil.wait_procs(children, timeout=5)[1]


class Place:
    """A prepared run and the processes that take part in it."""

    def __init__(self, directory: Path, prepared: Start, config: RunConfig) -> None:
        self.directory = directory
        prepare(prepared, config, directory / "run")
        self.processes: list[Process] = []
        # Its path is short, because those of sockets must be.
        self._temporary_dir = tempfile.TemporaryDirectory(prefix="place-")

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

    @property
    def sockets(self) -> set[str]:
        """What the processes have in their temporary directory."""
        names = (file.name for file in Path(self._temporary_dir.name).iterdir())
        return {name for name in names if name.startswith(("hivemind-", "dipaco-"))}

    def _launch(self, command: str, arguments: list[str], state_dir: Path) -> Process:
        with state_dir.with_suffix(".log").open("ab") as log:
            popen = subprocess.Popen(
                [str(BIN / command), *arguments, *LOOPBACK, "-vv"],
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": self._temporary_dir.name},
            )
        self.processes.append(Process(state_dir, popen))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        self._temporary_dir.cleanup()
