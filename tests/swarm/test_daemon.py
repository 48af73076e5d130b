from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from dht.daemon import SOCKET_DIR_PREFIX, Daemon, DaemonConfig, check_ports
from dht.errors import LocalFault
from dht.identity import Identity

pytestmark = pytest.mark.swarm

PARENT = """
import asyncio, signal, sys
from pathlib import Path
from dht.daemon import Daemon

async def main():
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    daemon = await Daemon.start(Path(sys.argv[1]))
    print(daemon.pid, daemon.control_maddr, flush=True)
    await interrupted.wait()
    await asyncio.open_unix_connection(daemon.control_maddr.removeprefix("/unix"))
    print("alive", daemon.alive, flush=True)
    await daemon.close()

asyncio.run(main())
"""


def start_parent(directory: Path) -> tuple[subprocess.Popen[str], int, Path]:
    """A process with a p2pd of its own: (process, p2pd's process ID, its socket directory)."""
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", PARENT, directory / "identity.key"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert parent.stdout is not None
    pid, control_maddr = parent.stdout.readline().split()
    return parent, int(pid), Path(control_maddr.removeprefix("/unix")).parent


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    parent, pid, socket_dir = start_parent(tmp_path)
    assert is_running(pid)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)
    for file in socket_dir.iterdir():
        file.unlink()
    socket_dir.rmdir()


def test_a_ctrl_c_in_the_terminal_reaches_only_the_parent(tmp_path: Path) -> None:
    parent, pid, socket_dir = start_parent(tmp_path)
    assert os.getsid(pid) != os.getsid(parent.pid)
    os.killpg(parent.pid, signal.SIGINT)
    output, _ = parent.communicate(timeout=20)
    assert output == "alive True\n"
    assert parent.returncode == 0
    assert not is_running(pid)
    assert not socket_dir.exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            config = DaemonConfig(host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",))
            with pytest.raises(LocalFault, match=f"another program listens at .*/{port}") as caught:
                await Daemon.start(tmp_path / "identity.key", config=config)
        assert "port" in caught.value.hint

    asyncio.run(main())


@pytest.mark.parametrize("host", ["/ip4/127.0.0.1", "/ip4/0.0.0.0", "/ip6/::1"])
def test_two_p2pds_do_not_share_a_port(tmp_path: Path, host: str) -> None:
    """The kernel would let them, and deal connections out between the two."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = DaemonConfig(host_maddrs=(f"{host}/tcp/{port}",))
        first = await Daemon.start(tmp_path / "first.key", config=config)
        with pytest.raises(LocalFault, match=f"another program listens at .*/{port}"):
            await Daemon.start(tmp_path / "second.key", config=config)
        await first.close()
        second = await Daemon.start(tmp_path / "second.key", config=config)
        await second.close()

    asyncio.run(main())


def test_a_connection_that_lingers_at_a_port_is_not_in_the_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # first, so that this side of it waits for TIME_WAIT to pass
            assert client.recv(1) == b""
    check_ports([f"/ip4/127.0.0.1/tcp/{port}"])


def test_p2pd_takes_our_identity_and_is_started_and_closed_quickly(tmp_path: Path) -> None:
    async def main() -> None:
        daemon = await Daemon.start(tmp_path / "identity.key")
        assert daemon.alive
        assert daemon.peer_id == Identity.load_or_create(tmp_path / "identity.key").peer_id
        await daemon.close()
        await daemon.close()
        assert not daemon.alive

    asyncio.run(main())


def test_a_long_temporary_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_dir = tmp_path / ("x" * 100)
    long_dir.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long_dir))

    async def main() -> None:
        daemon = await Daemon.start(tmp_path / "identity.key")
        await daemon.close()

    asyncio.run(main())
    assert list(long_dir.iterdir()) == []


def test_it_removes_the_sockets_that_killed_peers_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others: one that is listened to, one that may be about to be."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {"dead": 3600.0, "alive": 3600.0, "fresh": 0.0}
    with ExitStack() as stack:
        for name, age_seconds in names.items():
            directory = tmp_path / f"{SOCKET_DIR_PREFIX}{name}"
            directory.mkdir()
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(directory / "p2pd.sock"))
            if name == "alive":
                listener.listen()
            else:
                listener.close()
            begin = time.time() - age_seconds
            os.utime(directory, (begin, begin))

        async def start_and_close() -> None:
            daemon = await Daemon.start(tmp_path / "identity.key")
            await daemon.close()

        asyncio.run(start_and_close())
        left = {f.name.removeprefix(SOCKET_DIR_PREFIX) for f in tmp_path.iterdir() if f.is_dir()}
    assert left == {"alive", "fresh"}
