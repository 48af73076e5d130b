"""Runs p2pd, the go-libp2p daemon that ships inside hivemind's wheel, as a child of this process.

We launch it ourselves rather than through hivemind: it is in its own session, so a Ctrl-C in the
terminal reaches us first and we can still say goodbye; the kernel kills it when we die, however we
die; it listens on TCP only (the QUIC of this build has known memory-exhaustion faults); it relays
for others only when asked to; and its control socket lies in a private directory that goes away
with it. Importing this module does not import hivemind.

Start it from the main thread: the kernel ties the child's life to the thread that forked it.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dht.errors import LocalFault
from dht.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

STARTUP_SECONDS = 60.0  # a busy volunteer's machine takes long; an idle one 0.3 s
SHUTDOWN_SECONDS = 5.0  # between asking it to stop and killing it
IDLE_SECONDS = 60  # p2pd leaves by itself when we have not connected to it by then
MAX_OUTPUT_BYTES = 8192  # of what it prints, kept to explain a failed start
MAX_SOCKET_NAME_BYTES = 107  # a Unix socket's, on Linux
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonConfig:
    """How a volunteer's p2pd meets the network."""

    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)  # to listen on: TCP
    announce_maddrs: tuple[str, ...] = ()  # that others are told instead of these
    trusted_relays: tuple[str, ...] = ()  # through which to be reached behind a NAT
    nat_traversal: bool = False  # ask the router for a port, and else a trusted relay
    relay_service: bool = False  # relay for others, 16 circuits each


class Daemon:
    """A running p2pd. Made by `Daemon.start`; must be closed.

    It serves one `KademliaSwarm`, and ends by itself when that is closed.
    """

    def __init__(self, process: asyncio.subprocess.Process, socket_dir: Path, peer_id: str) -> None:
        self.peer_id = peer_id
        self.control_maddr = f"/unix{_socket_file(socket_dir)}"
        self._process = process
        self._socket_dir = socket_dir
        self._output = _Output(process)

    @classmethod
    async def start(cls, identity_file: Path, *, config: DaemonConfig = DaemonConfig()) -> Daemon:
        """Launch p2pd with the key in `identity_file`, and wait until it listens.

        Raises `LocalFault`.
        """
        peer_id = Identity.load_or_create(identity_file).peer_id
        socket_dir = _make_socket_dir()
        flags = _flags(config, identity_file=identity_file, socket_file=_socket_file(socket_dir))
        try:
            process = await asyncio.create_subprocess_exec(
                _p2pd_file(),
                *flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as e:
            shutil.rmtree(socket_dir, ignore_errors=True)
            raise LocalFault(f"cannot run p2pd: {e}", hint="reinstall hivemind") from e
        daemon = cls(process, socket_dir, peer_id)
        try:
            await daemon._wait_until_ready()
        except BaseException:
            await daemon.close()
            raise
        return daemon

    @property
    def pid(self) -> int:
        """The process ID of p2pd."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether p2pd is still running."""
        return self._process.returncode is None

    async def close(self) -> None:
        """Stop p2pd, and remove its socket. Does nothing the second time."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        await self._output.close()
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        """Not by the methods of `_process`: they reap a child that has just ended, unnoticed."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _wait_until_ready(self) -> None:
        try:
            async with asyncio.timeout(STARTUP_SECONDS):
                await self._output.ready.wait()
        except TimeoutError as e:
            raise LocalFault(f"p2pd did not start within {STARTUP_SECONDS:.0f} s") from e
        if f"Peer ID: {self.peer_id}" not in self._output.text:
            raise LocalFault(
                f"p2pd did not start: {self._output.last_line}",
                hint="is another program using the port of the address to listen on?",
            )


class _Output:
    """Reads what p2pd prints, for ever, since it would block otherwise; keeps the first part."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.text = ""
        self.ready = asyncio.Event()  # it listens, or it has ended
        self._task = asyncio.create_task(self._drain(process))

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    async def _drain(self, process: asyncio.subprocess.Process) -> None:
        stdout = process.stdout
        while stdout is not None and (part := await stdout.read(MAX_OUTPUT_BYTES)):
            room = MAX_OUTPUT_BYTES - len(self.text)
            self.text += part.decode(errors="replace")[:room]
            if "Peer Addrs:" in self.text:
                self.ready.set()
        self.ready.set()

    async def close(self) -> None:
        await self._task


def _flags(config: DaemonConfig, *, identity_file: Path, socket_file: Path) -> list[str]:
    """The command line of p2pd."""
    values: dict[str, str | bool] = {
        "listen": f"/unix{socket_file}",
        "id": str(identity_file),
        "hostAddrs": ",".join(config.host_maddrs),
        "announceAddrs": ",".join(config.announce_maddrs),
        "trustedRelays": ",".join(config.trusted_relays),
        "autonat": config.nat_traversal,
        "natPortMap": config.nat_traversal,
        "autoRelay": config.nat_traversal and bool(config.trusted_relays),
        "relay": True,  # to reach those who can be reached only so
        "relayService": config.relay_service,
        "dhtServer": True,  # so that peers are found by ID alone, on local networks too
        "tls": True,
        "connManager": True,
        "b": False,  # p2pd gives up when a first peer is down; we connect to them ourselves
        "idleTimeout": f"{IDLE_SECONDS}s",
    }
    return [
        f"-{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in values.items()
        if value != ""
    ]


def _p2pd_file() -> str:
    """Where hivemind's wheel has put the binary."""
    spec = importlib.util.find_spec("hivemind")
    for package_dir in (spec and spec.submodule_search_locations) or ():
        file = Path(package_dir) / "hivemind_cli" / "p2pd"
        if file.is_file():
            return str(file)
    raise LocalFault(
        "hivemind's p2pd is not installed", hint="install hivemind from its wheel: Linux or macOS"
    )


def _make_socket_dir() -> Path:
    socket_dir = Path(tempfile.mkdtemp(prefix="dipaco-"))
    if len(os.fsencode(_socket_file(socket_dir))) > MAX_SOCKET_NAME_BYTES:
        socket_dir.rmdir()
        socket_dir = Path(tempfile.mkdtemp(prefix="dipaco-", dir="/tmp"))
    return socket_dir


def _socket_file(socket_dir: Path) -> Path:
    return socket_dir / "p2pd.sock"


def _die_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes p2pd; all that it needs is looked up beforehand."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before_exec
