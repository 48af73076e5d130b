"""What a peer does to the machine and the network that it enters."""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING

import pytest

from peer.check import MIN_OPEN_FILES, check_open_files
from peer.config import PeerConfig
from peer.session import open_network

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.swarm

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """A limit on open files that a peer would meet; the one that it may raise it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_OPEN_FILES // 2, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_whoever_enters_a_network_may_open_many_files(tmp_path: Path, few_open_files: int) -> None:
    async def main() -> int:
        config = PeerConfig(state_dir=tmp_path, host_maddrs=LOOPBACK)
        async with open_network(config):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    limit = asyncio.run(main())
    assert limit >= min(MIN_OPEN_FILES, few_open_files)
    assert check_open_files().text == f"up to {limit}", "what `check` says is what `join` gets"


def test_too_few_open_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    finding = check_open_files()
    assert not finding.ok
    assert finding.text == "up to 256"
    assert "ulimit" in finding.fix
