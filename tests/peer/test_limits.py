"""`--disk-limit` and `--memory-limit`: refused beforehand, kept to later, in words."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click
import pytest

from dht.errors import LocalFault
from dipaco.checkpoint import state_bytes
from dipaco.config import TopologyConfig
from dipaco.digest import CHUNK_BYTES, index_of
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.command_options import SizeType
from peer.config import PeerConfig
from peer.events import EventLog
from peer.faults import Faults
from peer.limits import KEPT_BYTES_PER_PARAMETER, affordable, disk_bytes, divide, path_parameters
from peer.memory import MemoryNetwork
from peer.modules import MAX_RECENT_BYTES
from peer.store import BlobStore
from tests.lab import LabPeer, lab
from tests.little_run import identity, little_config, make_run
from tests.names import peer_named
from tests.virtual_clock import run_virtual

if TYPE_CHECKING:
    from pathlib import Path

ROUND = 20.0  # virtual seconds
CONFIG = little_config()
MANIFEST = make_run(CONFIG, operator=identity(1), start_time=0.0).manifest
BLOB = os.urandom(3 * CHUNK_BYTES)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("20", 20e9), ("20GB", 20e9), ("512 mb", 512e6), ("1.5TiB", 1.5e12), ("64k", 64e3)],
)
def test_sizes_are_read_kindly(text: str, num_bytes: float) -> None:
    assert SizeType().convert(text, None, None) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "20 GB of it", "1e9"])
def test_what_is_no_size_is_answered_with_one(text: str) -> None:
    with pytest.raises(click.UsageError, match="20GB, 512MB"):
        SizeType().convert(text, None, None)


def test_a_path_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    config = PeerConfig(state_dir=tmp_path, disk_limit_bytes=1000, memory_limit_bytes=10**9)
    with pytest.raises(LocalFault, match="of disk") as caught:
        divide(config, MANIFEST, run_dir=tmp_path, trains_on_cpu=True)
    roomy = replace(config, disk_limit_bytes=hinted(caught.value, "--disk-limit"))
    with pytest.raises(LocalFault, match="of memory") as caught:
        divide(roomy, MANIFEST, run_dir=tmp_path, trains_on_cpu=True)
    roomy = replace(roomy, memory_limit_bytes=hinted(caught.value, "--memory-limit"))
    limits = divide(roomy, MANIFEST, run_dir=tmp_path, trains_on_cpu=True)
    assert limits.training_bytes is not None
    state = state_bytes(path_parameters(CONFIG, MANIFEST.topology))
    assert state <= limits.recent_bytes < MAX_RECENT_BYTES
    spare = roomy.disk_limit_bytes - disk_bytes(MANIFEST)
    assert 0 < limits.duty_bytes < spare


def test_what_is_kept_of_former_paths_is_within_the_limit(tmp_path: Path) -> None:
    kept_bytes = KEPT_BYTES_PER_PARAMETER * path_parameters(CONFIG, MANIFEST.topology)
    limit = disk_bytes(MANIFEST) + 5 * kept_bytes
    config = PeerConfig(state_dir=tmp_path, disk_limit_bytes=limit)
    limits = divide(config, MANIFEST, run_dir=tmp_path, trains_on_cpu=True)
    assert limits.paths_kept == 3
    assert limits.duty_bytes == 3 * kept_bytes
    unlimited = divide(
        PeerConfig(state_dir=tmp_path), MANIFEST, run_dir=tmp_path, trains_on_cpu=True
    )
    assert unlimited.paths_kept > 3


@pytest.mark.parametrize("wire_format", ["float32", "int4"])
def test_the_least_limit_has_room_for_full_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire_format: str
) -> None:
    num_peers = 6
    monkeypatch.setattr("peer.limits.MAX_COUNTED", num_peers)
    config = little_config(
        num_rounds=100, round_seconds=ROUND, blocking=False, wire_format=wire_format
    )
    config = replace(
        config,
        topology=TopologyConfig(levels=(1,)),
        model=replace(config.model, width=64, ffn_width=128),  # large beside the blocks of a disk
    )

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            tight = await place.join("tight", step_seconds=2.0)  # who commits before a slot's end
            least = PeerConfig(state_dir=tmp_path, disk_limit_bytes=disk_bytes(place.run.manifest))
            limits = divide(least, place.run.manifest, run_dir=tmp_path, trains_on_cpu=True)
            tight.keeper.node.store.limit_bytes = limits.blob_bytes
            for number in range(1, num_peers):
                await place.join(f"peer{number}", step_seconds=2.0)
            await place.until_versions(5, [tight], within=8 * ROUND)
            assert not tight.seen("error")

    run_virtual(scenario())


def test_a_peer_with_a_ceiling_relays_for_nobody() -> None:
    """What p2pd relays could not be held back."""
    assert PeerConfig(relay_service=True).relays
    assert not PeerConfig(relay_service=True, max_mbps=20.0).relays


def hinted(error: LocalFault, option: str) -> int:
    """What the hint says to allow."""
    match = re.search(rf"`{option} (.+)`", error.hint)
    assert match is not None
    return SizeType().convert(match[1], None, None)


def test_duties_are_taken_while_there_is_room() -> None:
    wanted = [("a", 5), ("b", 7), ("c", 4)]
    assert affordable(wanted, None) == ["a", "b", "c"]
    assert affordable(wanted, 10) == ["a", "c"]
    assert affordable(wanted, 0) == []


def test_a_store_at_its_limit_makes_room_or_refuses_and_stays_whole(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    old = store.add(BLOB[::-1])
    store.limit_bytes = 4 * CHUNK_BYTES
    with pytest.raises(LocalFault, match="limit") as caught:
        store.add(BLOB)
    assert "--disk-limit" in caught.value.hint
    with pytest.raises(LocalFault, match="limit"):
        store.open_part(index_of(BLOB))
    assert store.digests() == [old]
    assert store.read(old) == BLOB[::-1]
    store.on_full = lambda num_bytes: store.remove(old)
    assert store.read(store.add(BLOB)) == BLOB
    assert store.used_bytes < store.limit_bytes


def test_a_disk_that_fills_up_in_a_download_is_named_and_what_came_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, num_writes = os.pwrite, 0

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 2:
            raise OSError(errno.ENOSPC, "no space")
        return pwrite(fd, data, offset)

    async def scenario() -> None:
        network = MemoryNetwork()
        source, store = BlobStore(tmp_path / "source"), BlobStore(tmp_path / "client")
        digest = source.add(BLOB)
        await BlobServer(source).serve(network.transport(peer_named("source")))
        client = BlobClient(store, network.transport(peer_named("client")), Faults(events))
        fetch = partial(
            client.fetch, digest, [peer_named("source")], max_bytes=len(BLOB), timeout_seconds=10
        )
        with pytest.raises(LocalFault, match="disk is full"):
            await fetch()
        assert digest not in store
        await fetch()
        assert num_writes == 4, "one failed, and two were left to write"
        assert store.read(digest) == BLOB

    monkeypatch.setattr(os, "pwrite", full)
    events = EventLog(tmp_path / "events", lambda: 0.0)
    run_virtual(scenario())
    events.close()


def kept_for_others(peer: LabPeer) -> int:
    """Modules it holds that it neither trains, nor trained lately and is about to give up."""
    keeper = peer.keeper
    return len(set(keeper.node.log.held) - keeper._own - set(keeper._retiring))


def test_duties_are_declined_and_the_own_path_is_trained(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_keepers=8, num_rounds=2)) as place:
            await place.bootstrap()
            limits = {"tight": 0, "roomy": None}
            for name, duty_bytes in limits.items():
                peer = await place.join(name)
                peer.keeper._duty_bytes = duty_bytes
            await place.until(
                lambda: all(place.peers[name].seen("finished") for name in limits),
                within=200,
                what="both are finished",
            )
            tight, roomy = (place.peers[name] for name in limits)
            assert tight.seen("duties declined")
            assert not roomy.seen("duties declined")
            assert kept_for_others(tight) == 0
            assert kept_for_others(roomy) > 0

    run_virtual(scenario())
