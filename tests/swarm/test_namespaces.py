"""The internet of namespaces does what the tests on it rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.swarm.namespaces import Internet, require_namespaces

if TYPE_CHECKING:
    from tests.swarm.namespaces import Host

pytestmark = pytest.mark.swarm

SERVER = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    server.settimeout(10)
    print("listening", flush=True)
    connection, (address, _) = server.accept()
    while connection.recv(2**16):
        pass
    connection.close()
    print(address)
"""
CLIENT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000), timeout=5) as connection:
    started = time.monotonic()
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(time.monotonic() - started)
"""


def send(sender: Host, receiver: Host, num_bytes: int) -> tuple[float, str]:
    """(seconds it took, address that the receiver saw)."""
    server = subprocess.Popen(
        [*receiver.launcher, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        try:
            seconds = sender.run(sys.executable, "-c", CLIENT, receiver.address, str(num_bytes))
        except ChildProcessError:
            server.kill()
            raise
        return float(seconds), server.stdout.read().strip()


def test_rates_hold_both_ways_and_bytes_are_counted() -> None:
    require_namespaces()
    with Internet() as internet:
        fast, slow = internet.host(), internet.host(mbps=8)
        for sender, receiver in ((fast, slow), (slow, fast)):
            seconds, _ = send(sender, receiver, 10**6)
            assert seconds > 0.9, "1 MB at 8 Mbit/s"
        received_bytes, sent_bytes = slow.traffic_bytes
        assert 10**6 < received_bytes < 1.2 * 10**6
        assert 10**6 < sent_bytes < 1.2 * 10**6


def test_a_host_behind_nat_dials_and_cannot_be_dialled() -> None:
    require_namespaces()
    with Internet() as internet:
        public, hidden = internet.host(), internet.host(behind_nat=True)
        _, seen = send(hidden, public, 1000)
        assert seen.startswith("11.77."), "the router's address"
        with pytest.raises(ChildProcessError, match="unreachable"):
            send(public, hidden, 1000)


def test_nothing_is_left_when_the_context_ends() -> None:
    require_namespaces()
    files = set(os.listdir("/proc/self/fd"))
    with suppress(RuntimeError), Internet() as internet:
        internet.host(behind_nat=True)
        raise RuntimeError("the test failed")
    assert set(os.listdir("/proc/self/fd")) == files
