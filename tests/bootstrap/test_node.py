"""When a run counts as served, and what its operator is told to hand out."""

import asyncio
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bootstrap.node import advice_on, serve, warning_of
from bootstrap.prepare import MANIFEST_FILE, START_DIR
from dht.addresses import outside
from dht.errors import LocalFault
from dht.identity import Identity
from dipaco.errors import ConfigError
from dipaco.locking import working_in
from dipaco.start import Start
from peer.config import PeerConfig
from peer.display import Display
from tests.little_run import identity

PEER = f"/p2p/{identity(1).peer_id}"
HERE, AT_HOME, EVERYWHERE = (
    f"/ip4/{host}/tcp/31337{PEER}" for host in ("127.0.0.1", "192.168.1.2", "8.8.8.8")
)
NAME = f"/dns4/example.org/tcp/31337{PEER}"


@pytest.mark.parametrize(
    ("addresses", "offered", "advice"),
    [
        ([HERE], [HERE], "cannot use a private address: forward the port"),
        ([HERE, AT_HOME], [AT_HOME], "cannot use a private address: forward the port"),
        ([HERE, AT_HOME, EVERYWHERE], [AT_HOME, EVERYWHERE], "take the other lines, or forward"),
        ([HERE, EVERYWHERE], [EVERYWHERE], None),
        ([NAME], [NAME], None),
    ],
)
def test_strangers_are_offered_what_they_can_use(
    addresses: list[str], offered: list[str], advice: str | None
) -> None:
    assert outside(addresses) == offered
    said = advice_on(addresses)
    if advice is None:
        assert said == ""
    else:
        assert advice in said
        assert "`--announce-maddr`" in said


def test_a_key_that_others_can_read_is_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "identity"
    Identity.load_or_create(file)
    assert warning_of(file) == ""
    file.chmod(0o640)
    assert f"`chmod 600 {file}`" in warning_of(file)


@contextmanager
def listening() -> Iterator[int]:
    """Another program at a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_run_that_could_not_be_served_is_not_signed(start: Start, tmp_path: Path) -> None:
    """It would have a slot 0 that nobody was told of, or two manifests at once."""
    shutil.copytree(start.directory, tmp_path / START_DIR)

    def fail(port: int, why: str) -> None:
        maddr = f"/ip4/127.0.0.1/tcp/{port}"
        config = PeerConfig(state_dir=tmp_path, host_maddrs=(maddr,))
        with pytest.raises((LocalFault, ConfigError), match=why):
            asyncio.run(serve(config, Display(quiet=True), start_in=5.0))
        assert not (tmp_path / MANIFEST_FILE).exists()

    with listening() as port:
        fail(port, "another program listens")
    with working_in(tmp_path):
        fail(0, "another process is at work")
