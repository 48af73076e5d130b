"""Real peers as processes, forked from one that has imported everything, with a trap inside each.

The code that runs is that of `dipaco-peer join`, and of a bootstrap node without an operator. A
trap is a listener of the peer's event log: when the stage that it is set for is written, it sends
its signal before the peer's code goes on. So a fault falls where it is meant to, not about there.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.faults.cells import STAGES, Role
from tests.history_checker import Event, History

Run = Callable[[Path, tuple[str, ...]], None]
MANIFEST_DIR = "manifest"  # the run's manifest, in a file that has its digest as its name
BLOBS_DIR = "blobs"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
PRELOADED = ["torch", "hivemind", "bootstrap.node", "peer.join", "dht.kademlia", "peer.rpc"]
STEP_PAUSE_SECONDS = 0.2  # per inner step, so that two cores carry a whole swarm
LEAVE_SECONDS = 30.0
TRAP_NAME = "trap.json"
FIRED_NAME = "fired.json"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def warm_up() -> None:
    """Start the process that peers are forked from; importing takes it seconds, once."""
    process = _context.Process(target=os.getpid)
    process.start()
    process.join()


class Trap:
    """Sends a signal when this peer reaches the stage that the trap file names."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / TRAP_NAME
        self._fired_file = directory / FIRED_NAME
        self._peer = ""
        self._proposed: set[str] = set()

    def __call__(self, entry: Event) -> None:
        if entry["event"] == "started":
            self._peer = entry["peer"]
        elif entry["event"] == "proposing":
            self._proposed.add(entry["proposal"])
        if entry["event"] not in STAGES.values() or not self._file.exists():
            return
        order = json.loads(self._file.read_text())
        if entry["event"] != order["event"] or self._role(entry, order) != order["role"]:
            return
        self._file.unlink()
        _write(self._fired_file, entry)
        for pid in order["pids"]:
            os.kill(pid, order["signal"])

    def _role(self, entry: Event, order: dict[str, Any]) -> Role:
        if (
            entry["event"] in ("proposing", "publishing")
            or entry.get("leader") == self._peer
            or entry.get("proposal") in self._proposed
        ):
            return Role.LEADER
        is_own = "module" not in entry or entry["module"] in order["modules"]
        return Role.TRAINER if is_own else Role.KEEPER


class PeerProcess:
    """A peer on this machine: its process, as often as that is started, and its event log."""

    def __init__(self, name: str, state_dir: Path, run: Callable[..., None]) -> None:
        self.name = name
        self.state_dir = state_dir
        self.events: list[Event] = []
        self._run = run
        self._process: Any = None
        self._initial_peers: tuple[str, ...] = ()
        self._offset = 0
        state_dir.mkdir(parents=True, exist_ok=True)

    def start(self, initial_peers: Sequence[str] = ()) -> None:
        self._initial_peers = tuple(initial_peers)
        self.start_again()

    def start_again(self) -> None:
        """By the same command, whoever is still where that says."""
        arguments = (self._run, self.state_dir, self._initial_peers)
        self._process = _context.Process(target=_main, args=arguments, name=self.name)
        self._process.start()

    @property
    def address_file(self) -> Path:
        return self.state_dir / "address"

    @property
    def address(self) -> str:
        return self.address_file.read_text().split()[-1]

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return int(self._process.pid)

    @property
    def is_alive(self) -> bool:
        return bool(self._process is not None and self._process.is_alive())

    @property
    def has_died(self) -> bool:
        return self._process is not None and not self._process.is_alive()

    @property
    def p2pd(self) -> psutil.Process:
        """The newest p2pd of this peer."""
        children = psutil.Process(self.pid).children()
        return max((c for c in children if c.name() == "p2pd"), key=lambda c: c.create_time())

    def follow(self) -> list[Event]:
        """All events so far; a line that SIGKILL cut off is none."""
        for file in self.state_dir.glob("runs/*/events.jsonl"):
            with file.open("rb") as stream:
                stream.seek(self._offset)
                while (line := stream.readline()).endswith(b"\n"):
                    self._offset = stream.tell()
                    try:
                        self.events.append(json.loads(line))
                    except json.JSONDecodeError:
                        continue
        return self.events

    def history(self) -> History:
        started = next(event for event in self.follow() if event["event"] == "started")
        return History(run=started["run"], peer=started["peer"], events=self.events)

    def versions(self, *, until: float = float("inf")) -> dict[str, int]:
        """The version that this peer said it holds, per module, at a time."""
        versions = {}
        for event in self.follow():
            if event["event"] in ("version", "caught up", "resumed") and event["time"] <= until:
                versions[event["module"]] = event["version"]
        return versions

    def path_modules(self) -> list[str]:
        """The modules of the path that it trains: those it ever committed to for its last path."""
        committed = [event for event in self.follow() if event["event"] == "committed"]
        last = committed[-1]["path"] if committed else None
        return sorted({event["module"] for event in committed if event["path"] == last})

    def set_trap(self, event: str, role: Role, number: int, pids: Sequence[int]) -> None:
        (self.state_dir / FIRED_NAME).unlink(missing_ok=True)
        order = {
            "event": event,
            "role": role,
            "signal": int(number),
            "pids": list(pids),
            "modules": self.path_modules(),
        }
        _write(self.state_dir / TRAP_NAME, order)

    def disarm(self) -> None:
        (self.state_dir / TRAP_NAME).unlink(missing_ok=True)

    def fired(self) -> Event | None:
        """The event at which the trap sent its signal, once it has."""
        file = self.state_dir / FIRED_NAME
        return json.loads(file.read_text()) if file.exists() else None

    def kill(self) -> None:
        if self.is_alive:
            self._process.kill()
            self._process.join()

    def ask_to_leave(self) -> None:
        if self.is_alive:
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGINT)

    def leave(self) -> bool:
        """Wait for it to have left in good order; it is killed if it does not."""
        self._process.join(LEAVE_SECONDS)
        left = not self.is_alive
        self.kill()
        return left


def _main(run: Run, state_dir: Path, peers: tuple[str, ...]) -> None:
    """What a forked peer does: die with its parent, write into a file, spring traps, run."""
    die_with_parent()
    log = os.open(state_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    import torch

    import peer.join
    import peer.session
    from dipaco.inner import PathTrainer
    from peer.events import EventLog

    torch.set_num_threads(1)
    trap = Trap(state_dir)
    train_step = PathTrainer.train_step

    class TrappedLog(EventLog):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.listen(trap)

    def unhurried_step(trainer: PathTrainer, step: int) -> torch.Tensor:
        time.sleep(STEP_PAUSE_SECONDS)
        return train_step(trainer, step)

    peer.session.EventLog = TrappedLog  # type: ignore[misc]
    PathTrainer.train_step = unhurried_step  # type: ignore[method-assign]
    # The other peers of this machine are not its owner's programs, which would go first.
    peer.join.TRAINING_NICENESS = os.getpriority(os.PRIO_PROCESS, 0)
    run(state_dir, peers)


def die_with_parent() -> None:
    """Let the kernel end this process when the one that it was forked from ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def volunteer(state_dir: Path, initial_peers: tuple[str, ...]) -> None:
    """`dipaco-peer join`."""
    from peer.config import PeerConfig
    from peer.display import Display
    from peer.join import join

    config = PeerConfig(
        state_dir=state_dir,
        initial_peers=initial_peers,
        host_maddrs=LOOPBACK,
        device="cpu",
        threads=1,
    )
    asyncio.run(join(config, Display(quiet=True)))


def bootstrap_node(directory: Path, initial_peers: tuple[str, ...]) -> None:
    """What `dipaco-bootstrap serve` does, for a run made of random tokens."""
    asyncio.run(_serve(directory, initial_peers))


async def _serve(directory: Path, initial_peers: tuple[str, ...]) -> None:
    from peer.config import PeerConfig
    from peer.join import reachable_addresses, write_address_file
    from peer.keeper import Keeper
    from peer.manifest import parse_manifest
    from peer.providers import Providers
    from peer.session import address_book, make_node, open_network, run_directory

    [manifest_file] = (directory / MANIFEST_DIR).iterdir()
    manifest = parse_manifest(
        manifest_file.read_bytes(), digest=manifest_file.name, sender="operator"
    )
    config = PeerConfig(state_dir=directory, initial_peers=initial_peers, host_maddrs=LOOPBACK)
    run_dir = run_directory(directory, manifest.digest)
    book = address_book(run_dir, manifest.digest)
    async with open_network(config, known_maddrs=lambda: book.maddrs) as network:
        node = make_node(network, manifest=manifest, run_dir=run_dir)
        for file in (directory / BLOBS_DIR).iterdir():
            node.store.add(file.read_bytes())
        keeper = Keeper(node, Providers(node.swarm, node.store, node.blobs), keep_all=True)
        keeper.survey.on_addresses = book.note
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stopped.set)
        async with keeper.running():
            write_address_file(directory, await reachable_addresses(network))
            await stopped.wait()
        node.events.close()


def _write(file: Path, values: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(file)
