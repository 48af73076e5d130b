"""A volunteer of the demonstration: a real process, followed through its event log."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORK = Path("demo-run")
BIN = Path(sys.executable).parent
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass
class Volunteer:
    """One `dipaco-peer join` process, followed through its event log."""

    name: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    killed: bool = False
    launch_time: float = field(default_factory=time.time)
    _offset: int = 0

    @classmethod
    def start(cls, name: str, address: str) -> "Volunteer":
        """Start it, on one thread, in a state directory of its own."""
        state_dir = WORK / name
        state_dir.mkdir(parents=True)
        arguments = ["join", address, "--state-dir", str(state_dir), "--threads", "1"]
        with (WORK / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / "dipaco-peer"), *arguments, "--host-maddr", LOOPBACK, "-v"],
                stdout=log,
                stderr=log,
            )
        return cls(name, state_dir, process)

    def follow(self) -> None:
        """Read what it has logged since the last time."""
        for file in self.state_dir.glob("runs/*/events.jsonl"):
            with file.open() as stream:
                stream.seek(self._offset)
                while (line := stream.readline()).endswith("\n"):
                    self._offset = stream.tell()
                    self.events.append(json.loads(line))

    def last(self, event: str) -> dict[str, Any]:
        """Its latest event of a kind; empty if there is none."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    @property
    def address(self) -> str:
        """Where others can join through it."""
        return (self.state_dir / "address").read_text().split()[-1]

    @property
    def peer_id(self) -> str:
        """Its libp2p ID."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def status(self) -> str:
        """One word for the table."""
        if self.killed:
            return "killed"
        if self.process.poll() is not None:
            return "left"
        if self.last("finished"):
            return "finished"
        return "training" if self.last("first step") else "joining"


def newest_versions(volunteers: list[Volunteer]) -> dict[str, int]:
    """The newest version of every module that any volunteer has applied."""
    versions: dict[str, int] = {}
    for volunteer in volunteers:
        for entry in volunteer.events:
            if entry["event"] in ("version", "caught up"):
                module = entry["module"]
                versions[module] = max(versions.get(module, 0), entry["version"])
    return versions
