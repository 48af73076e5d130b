"""A small internet of network namespaces: hosts on one link, each with its own rate.

    with Internet() as internet:
        fast, slow = internet.host(), internet.host(mbps=5)
        hidden = internet.host(behind_nat=True)  # has a router of its own; nobody can dial it
        subprocess.run([*slow.launcher, "dipaco-peer", "join", ...])

What runs behind `launcher` sees that host's network only; Unix sockets and files are shared, so one
Python process can drive a p2pd on every host. A namespace is held by a file descriptor, not by a
name or a process: everything is gone when the context ends, or this process does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

T = TypeVar("T")

TOOLS = ("ip", "tc", "nsenter")
BURST_BYTES = 32 * 1024  # that a host may send at full speed before its rate holds
QUEUE_SECONDS = 0.1  # of packets that wait for the link before some are dropped
_CLONE_NEWNET = 0x40000000  # linux/sched.h


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine of the internet."""

    address: str  # its own; nobody else knows the way there if it is behind NAT
    seen_address: str  # that others see it at
    namespace: int  # file descriptor

    @property
    def launcher(self) -> tuple[str, ...]:
        """Put before a command, it runs there: as the same process, `nsenter` leaves none."""
        return ("nsenter", f"--net={_path(self.namespace)}", "--")

    def reaches(self, address: str, port: int) -> bool:
        """Whether a TCP connection to there can be opened from here."""
        dial = f"exec 3<>/dev/tcp/{address}/{port}"
        return (
            subprocess.run(
                [*self.launcher, "timeout", "2", "bash", "-c", dial],
                capture_output=True,
                timeout=20,
                check=False,
            ).returncode
            == 0
        )

    def run(self, *command: str) -> str:
        """Run a command there to its end; its output. Raises ChildProcessError with its words."""
        return _run(*self.launcher, *command)

    @property
    def traffic_bytes(self) -> tuple[int, int]:
        """(received, sent) by its interface since it was made, with all headers."""
        text = _inside(self.namespace, Path("/proc/thread-self/net/dev").read_text)
        [line] = [line for line in text.splitlines() if line.strip().startswith("eth0:")]
        figures = line.split(":")[1].split()
        return int(figures[0]), int(figures[8])


class Internet:
    """A link that every `host` is on. A context manager; needs root."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._num_hosts = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._switch = stack.enter_context(_Namespace())
            self._ip("link", "add", "bridge", "type", "bridge")
            self._ip("link", "set", "bridge", "up")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def host(self, *, mbps: float | None = None, behind_nat: bool = False) -> Host:
        """One more machine; its link carries `mbps` Mbit/s in either direction, or as it can."""
        self._num_hosts += 1
        number = self._num_hosts
        namespace = self._open.enter_context(_Namespace())
        address = f"11.77.0.{number}"
        outside = Host(address=address, seen_address=address, namespace=namespace)
        self._connect(self._switch, f"port{number}", outside, mbps)
        self._ip("link", "set", f"port{number}", "master", "bridge", "up")
        return self._behind(outside, number) if behind_nat else outside

    def _behind(self, router: Host, number: int) -> Host:
        """A machine that reaches the others only through `router`, with the router's address."""
        namespace = self._open.enter_context(_Namespace())
        inside = Host(
            address=f"192.168.{number}.2",
            seen_address=router.seen_address,
            namespace=namespace,
        )
        self._connect(router.namespace, "home", inside, None)
        gateway = f"192.168.{number}.1"
        router.run("ip", "address", "add", f"{gateway}/24", "dev", "home")
        router.run("ip", "link", "set", "home", "up")
        inside.run("ip", "route", "add", "default", "via", gateway)
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        _inside(router.namespace, lambda: forward.write_text("1"))
        _inside(router.namespace, _masquerade)
        return inside

    def _connect(self, namespace: int, name: str, host: Host, mbps: float | None) -> None:
        """A cable from interface `name` of a namespace to `eth0` of the host."""
        peer = ("peer", "name", "eth0", "netns", _path(host.namespace))
        _run(*_enter(namespace), "ip", "link", "add", name, "type", "veth", *peer)
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        if mbps is not None:
            for end, interface in ((namespace, name), (host.namespace, "eth0")):
                shape = ("rate", f"{mbps}mbit", "burst", str(BURST_BYTES))
                queue = ("latency", f"{QUEUE_SECONDS * 1000:.0f}ms")
                tc = ("tc", "qdisc", "add", "dev", interface, "root", "tbf")
                _run(*_enter(end), *tc, *shape, *queue)

    def _ip(self, *arguments: str) -> None:
        _run(*_enter(self._switch), "ip", *arguments)


@cache
def why_not_permitted() -> str:
    """Empty if this machine lets us make namespaces; else the reason, for a skipped test."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with Internet() as internet:
            internet.host(mbps=10, behind_nat=True)
    except OSError as error:
        return f"network namespaces are not permitted: {error}"
    return ""


def require_namespaces() -> None:
    """Skip the test where there can be none."""
    if reason := why_not_permitted():
        pytest.skip(reason)


class _Namespace:
    """A network namespace with its loopback up; it lives as long as its file descriptor."""

    def __enter__(self) -> int:
        self._file = _in_thread(_new_namespace)
        _run(*_enter(self._file), "ip", "link", "set", "lo", "up")
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _new_namespace() -> int:
    """In a thread that ends afterwards: it stays in the new namespace."""
    _check(_libc().unshare(_CLONE_NEWNET))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _inside(namespace: int, function: Callable[[], T]) -> T:
    """Call `function` in a thread inside a namespace."""

    def enter_and_call() -> T:
        _check(_libc().setns(namespace, _CLONE_NEWNET))
        return function()

    return _in_thread(enter_and_call)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:  # handed over to the thread that waits for it
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _path(namespace: int) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _enter(namespace: int) -> tuple[str, ...]:
    return ("nsenter", f"--net={_path(namespace)}", "--")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise ChildProcessError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


def _masquerade() -> None:
    """`nft add rule ip home out masquerade`, said to the kernel: `nft` is rarely installed."""
    table, chain = _attribute(1, b"home\0"), _attribute(3, b"out\0")
    hook = _attribute(4, _attribute(1, _u32(4)) + _attribute(2, _u32(100)))  # after routing
    masquerade = _attribute(4, _attribute(1, _attribute(1, b"masq\0")))
    messages = [
        _message(0x10, 0, b"", res_id=10),  # a transaction of nf_tables
        _message(10 << 8 | 0, 0x400, table),
        _message(10 << 8 | 3, 0x400, table + chain + hook + _attribute(7, b"nat\0")),
        _message(10 << 8 | 6, 0xC04, table + _attribute(2, b"out\0") + masquerade),
        _message(0x11, 0, b"", res_id=10),
    ]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        netfilter.settimeout(5)
        netfilter.send(b"".join(messages))
        (error,) = struct.unpack_from("=i", netfilter.recv(4096), 16)
    if error:
        raise OSError(-error, f"no NAT in this kernel: {os.strerror(-error)}")


def _message(kind: int, flags: int, attributes: bytes, *, res_id: int = 0) -> bytes:
    """A netlink message of nfnetlink, for IPv4; 1 says that it is a request."""
    body = struct.pack(">BBH", socket.AF_INET, 0, res_id) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, flags | 1, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    header = struct.pack("=HH", 4 + len(value), kind)
    return header + value + bytes(-len(value) % 4)


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)
