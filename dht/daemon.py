"""Runs p2pd, the go-libp2p daemon that ships inside hivemind's wheel, as a child of this process.

We launch it ourselves rather than through hivemind: it is in its own session, so a Ctrl-C in the
terminal reaches us first and we can still say goodbye; the kernel kills it when we die, however we
die; it listens on TCP only (the QUIC of this build has known memory-exhaustion faults); it relays
for others only when asked to; and its control socket lies in a private directory that goes away
with it. Importing this module does not import hivemind: what p2pd is asked once it runs is in
`dht.control`, and who replaces one that dies or hangs is `peer.watchdog`.

Start it from the main thread: the kernel ties the child's life to the thread that forked it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dht.errors import LocalFault
from dht.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STARTUP_SECONDS = 60.0  # a busy volunteer's machine takes long; an idle one 0.3 s
SHUTDOWN_SECONDS = 5.0  # between asking it to stop and killing it
IDLE_SECONDS = 60  # p2pd leaves by itself when we have not connected to it by then
MAX_OUTPUT_BYTES = 8192  # of what it prints, kept to explain a failed start
MAX_SOCKET_NAME_BYTES = 107  # a Unix socket's, on Linux
SOCKET_DIR_PREFIX = "dipaco-"
MIN_SWEEP_SECONDS = 60.0  # before a directory is taken to be left over: its p2pd may be starting
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonConfig:
    """How a volunteer's p2pd meets the network."""

    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)  # to listen on: TCP
    announce_maddrs: tuple[str, ...] = ()  # that others are told instead of these
    map_port: bool = False  # ask the router for a port (UPnP, NAT-PMP)
    client_mode: bool = False  # listen nowhere
    trusted_relays: tuple[str, ...] = ()  # through which others reach it, who cannot dial it
    relay_service: bool = False  # relay for others, 16 circuits each; it can be dialled
    launcher: tuple[str, ...] = ()  # a command that p2pd is run by, such as `nsenter`

    @property
    def is_hidden(self) -> bool:
        """Whether others cannot dial it, or only through a relay."""
        return self.client_mode or bool(self.trusted_relays)


_ENVIRONMENT = {
    "GOLOG_LOG_LEVEL": "error",
    # One thread carries some hundred MB/s, and takes a third less of the processor than several
    # that wake one another for every 32 KiB. It also decides which of p2pd's two relay services
    # answers, the one that registers last: that of the flags, which relays 4 GiB in 30 minutes, and
    # hardly ever the one with go-libp2p's defaults, 128 KiB in 2 minutes, too little for a blob.
    "GOMAXPROCS": "1",
}


class Daemon:
    """A p2pd that runs with one identity. Made by `Daemon.start`; must be closed.

    It serves one `KademliaSwarm`, and ends by itself when that is closed.
    """

    def __init__(self, identity_file: Path, config: DaemonConfig) -> None:
        self.peer_id = Identity.load_or_create(identity_file).peer_id
        self.config = config
        self._identity_file = identity_file
        self._process: asyncio.subprocess.Process | None = None
        self._socket_dir: Path | None = None
        self._output: _Output | None = None

    @classmethod
    async def start(cls, identity_file: Path, *, config: DaemonConfig = DaemonConfig()) -> Daemon:
        """Launch p2pd with the key in `identity_file`, and wait until it listens.

        Raises `LocalFault`.
        """
        daemon = cls(identity_file, config)
        await daemon._launch()
        return daemon

    async def restart(self, config: DaemonConfig | None = None) -> None:
        """End p2pd, which may hang or be gone, and launch it anew: same identity, same ports.

        `config` replaces the one so far. Raises `LocalFault`; then there is no p2pd.
        """
        listening = self._output.maddrs if self._output is not None else ()
        await self._end(signal.SIGKILL)
        config = config or self.config
        self.config = replace(config, host_maddrs=with_ports(config.host_maddrs, listening))
        await self._launch()

    @property
    def control_maddr(self) -> str:
        """Where it takes orders; another place after a restart."""
        assert self._socket_dir is not None, "it has been started"
        return f"/unix{_socket_file(self._socket_dir)}"

    @property
    def listening(self) -> tuple[str, ...]:
        """Where p2pd listens: the addresses it was given, with its port where any would do.

        Without that port where it was told what to announce, since it names nothing else then.
        """
        if self._output is None or self.config.announce_maddrs:
            return self.config.host_maddrs
        return with_ports(self.config.host_maddrs, self._output.maddrs)

    @property
    def pid(self) -> int:
        """The process ID of p2pd."""
        assert self._process is not None, "it has been started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether p2pd is still running."""
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> None:
        """Until p2pd has ended."""
        if self._process is not None:
            await self._process.wait()

    async def close(self) -> None:
        """Stop p2pd, and remove its socket. Does nothing the second time."""
        await self._end(signal.SIGTERM)

    async def _launch(self) -> None:
        if not self.config.client_mode and not self.config.launcher:  # that leads elsewhere
            check_ports(self.config.host_maddrs)
        self._socket_dir = socket_dir = _make_socket_dir()
        socket_file = _socket_file(socket_dir)
        flags = _flags(self.config, identity_file=self._identity_file, socket_file=socket_file)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.config.launcher,
                _p2pd_file(),
                *flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as e:
            shutil.rmtree(socket_dir, ignore_errors=True)
            raise LocalFault(f"cannot run p2pd: {e}", hint="reinstall hivemind") from e
        self._output = _Output(self._process)
        try:
            await self._wait_until_ready(self._output)
        except BaseException:
            await self.close()
            raise

    async def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._output is None or self._socket_dir is None:
            return
        self._signal(number)
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

    async def _wait_until_ready(self, output: _Output) -> None:
        try:
            async with asyncio.timeout(STARTUP_SECONDS):
                await output.ready.wait()
        except TimeoutError as e:
            raise LocalFault(f"p2pd did not start within {STARTUP_SECONDS:.0f} s") from e
        if f"Peer ID: {self.peer_id}" not in output.text:
            raise LocalFault(
                f"p2pd did not start: {output.last_line}",
                hint="is another program using the port of the address to listen on?",
            )


def check_ports(host_maddrs: Sequence[str]) -> None:
    """Raise `LocalFault` if another program listens at one of these addresses.

    p2pd would not notice where that is a p2pd, too: both have SO_REUSEPORT, the kernel deals
    connections out between them, and half of those who dial meet the wrong key. What else may be
    wrong with an address, p2pd says itself.
    """
    for host_maddr in host_maddrs:
        found = re.fullmatch(r"/ip([46])/([^/]+)/tcp/(\d+)", host_maddr)
        if found is None or int(found[3]) == 0:
            continue
        family = socket.AF_INET if found[1] == "4" else socket.AF_INET6
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections of a p2pd that has just ended may linger at its port; only who listens
            # there is in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as p2pd listens
            if _is_taken(probe, found[2], int(found[3])):
                raise LocalFault(
                    f"p2pd did not start: another program listens at {host_maddr}",
                    hint="is another peer running? give this one a port of its own: `--host-maddr`",
                )


def _is_taken(probe: socket.socket, host: str, port: int) -> bool:
    try:
        probe.bind((host, port))
    except OSError as e:
        return e.errno == errno.EADDRINUSE
    return False


def with_ports(host_maddrs: Sequence[str], listening: Sequence[str]) -> tuple[str, ...]:
    """`host_maddrs` with the port that p2pd was given, where any port would do (`/tcp/0`)."""
    return tuple(_with_port(host_maddr, listening) for host_maddr in host_maddrs)


def _with_port(host_maddr: str, listening: Sequence[str]) -> str:
    host, found, _ = host_maddr.rpartition("/tcp/0")
    if not found or not host_maddr.endswith("/tcp/0"):
        return host_maddr
    family = host.split("/")[1]
    wildcards = ("/ip4/0.0.0.0", "/ip6/::")
    prefix = f"/{family}/" if host in wildcards else f"{host}/"
    for maddr in listening:
        where, _, port = maddr.rpartition("/tcp/")
        if f"{where}/".startswith(prefix) and port.isdigit():
            return f"{host}/tcp/{port}"
    return host_maddr


class _Output:
    """Reads what p2pd prints, for ever, since it would block otherwise; keeps the first part."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.text = ""
        self.ready = asyncio.Event()  # it listens, or it has ended
        self._task = asyncio.create_task(self._drain(process))

    @property
    def maddrs(self) -> list[str]:
        """Where it listens."""
        lines = [line.strip() for line in self.text.splitlines()]
        return [line for line in lines if line.startswith("/")]

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
        "hostAddrs": "" if config.client_mode else ",".join(config.host_maddrs),
        "noListenAddrs": config.client_mode,
        "announceAddrs": ",".join(config.announce_maddrs),
        "trustedRelays": ",".join(config.trusted_relays),
        "natPortMap": config.map_port,
        "autonat": True,  # punch holes, where two that cannot be dialled meet at a relay
        "autoRelay": bool(config.trusted_relays),
        "relayDiscovery": False,  # of others than these, which takes minutes
        # p2pd cannot be told what others have found out in any other way, and would wait to do so
        "forceReachabilityPrivate": config.is_hidden,
        "forceReachabilityPublic": config.relay_service and not config.is_hidden,
        "relay": True,  # to reach those who can be reached only so
        "relayService": config.relay_service and not config.is_hidden,
        "dhtServer": True,  # so that peers are found by ID alone, on local networks too
        "tls": True,
        "noise": False,  # it would be preferred, and takes the processor a fifth longer
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
    _sweep_socket_dirs()
    socket_dir = Path(tempfile.mkdtemp(prefix=SOCKET_DIR_PREFIX))
    if len(os.fsencode(_socket_file(socket_dir))) > MAX_SOCKET_NAME_BYTES:
        socket_dir.rmdir()
        socket_dir = Path(tempfile.mkdtemp(prefix=SOCKET_DIR_PREFIX, dir="/tmp"))
    return socket_dir


def _sweep_socket_dirs() -> None:
    """Delete what peers of this user that were killed have left: sockets that nobody listens to."""
    for socket_dir in Path(tempfile.gettempdir()).glob(f"{SOCKET_DIR_PREFIX}*"):
        with suppress(OSError):
            status = socket_dir.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > MIN_SWEEP_SECONDS:
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(1.0)
                    try:
                        client.connect(str(_socket_file(socket_dir)))
                    except ConnectionRefusedError:
                        shutil.rmtree(socket_dir)


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
