"""A volunteer's disk is full, or has garbled something: it says so, and trains if it can."""

import asyncio
import errno
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from dht.errors import LocalFault
from dipaco.config import RoutingConfig, TopologyConfig
from dipaco.discriminative import encode_scores
from dipaco.tensors import encoded_pieces
from dipaco.topology import ModuleID
from peer.path_files import BEST_SUFFIX
from peer.store import BlobStore, PartialBlob
from tests.lab import LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 10.0  # virtual seconds
CONFIG = little_config(num_rounds=1000, round_seconds=ROUND, blocking=False)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Takes tensors, or is full."""

    is_full = False

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterable[bytes | memoryview]:
        if self.is_full:
            raise full_disk()
        return encoded_pieces(tensors)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr("dipaco.checkpoint.encoded_pieces", disk.pieces)
    return disk


@pytest.mark.parametrize("what", ["shards", "states"])
def test_who_has_no_room_for_a_path_is_told_so_and_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    write = PartialBlob.write

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            await place.bootstrap()
            manifest = place.run.manifest
            refs = [s.blob for s in manifest.shards] if what == "shards" else manifest.starts
            refused = {ref.digest for ref in refs}

            def limited(part: PartialBlob, chunk: int, data: bytes) -> bool:
                if part.index.digest in refused:
                    raise full_disk()
                return write(part, chunk, data)

            monkeypatch.setattr(PartialBlob, "write", limited)
            peer = await place.join("peer")
            assert peer.task is not None
            with pytest.raises(LocalFault, match="disk is full"):
                await asyncio.wait_for(peer.task, 3 * ROUND)
            peer.task = None

    run_virtual(scenario())


def test_a_shard_that_rots_while_its_volunteer_is_away_is_fetched_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = replace(CONFIG, topology=TopologyConfig(levels=(1, 1)))  # no other path to turn to
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            await place.until_versions(1, [peer], within=5 * ROUND)
            await place.kill("peer")
            [shard] = place.run.manifest.shards
            file = tmp_path / "peer" / "blobs" / shard.blob.digest
            intact = file.read_bytes()
            file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
            peer = await place.join("peer")
            await place.until_versions(3, [peer], within=5 * ROUND)
            assert not peer.seen("path not to be had")
            assert file.read_bytes() == intact

    run_virtual(scenario())


def what_failed(peer: LabPeer) -> set[str]:
    return {entry["where"] for entry in peer.seen("error")}


@pytest.mark.parametrize("blocking", [False, True])
def test_training_goes_on_while_nothing_can_be_kept_for_the_next_start(
    tmp_path: Path, disk: Disk, blocking: bool
) -> None:
    config = replace(
        little_config(num_rounds=1000, round_seconds=ROUND, blocking=blocking),
        topology=TopologyConfig(levels=(1,)),
    )

    directory = tmp_path / "peer" / "paths"
    best = directory / f"0{BEST_SUFFIX}"

    def kept() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in directory.iterdir()}

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            await place.until_versions(2, [peer], within=6 * ROUND)
            best.unlink()  # so that the next one is the best
            disk.is_full, before = True, kept()
            await place.issue(config)
            await place.until_versions(6, [peer], within=8 * ROUND)
            assert kept() == before
            assert what_failed(peer) == {"optimizer", "path at its best"}
            assert peer.seen("round")[-1]["round"] >= 5, "it is evaluated all the same"
            assert peer.seen("manifest in force"), "with the optimizer that was kept last"
            disk.is_full = False
            await place.until(
                lambda: best.exists() and kept() != {**before, best.name: best.read_bytes()},
                within=3 * ROUND,
                what="all is kept",
            )

    run_virtual(scenario())


def test_who_takes_turns_stays_or_moves_on_as_far_as_the_disk_allows(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, topology=TopologyConfig(levels=(2,)))

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            hold = peer.keeper.hold

            async def limited(modules: Iterable[ModuleID]) -> bool:
                if disk.is_full and not peer.seen("path not to be had"):
                    raise full_disk()
                return await hold(modules)

            monkeypatch.setattr(peer.keeper, "hold", limited)
            await place.until(lambda: bool(peer.seen("moved")), within=9 * ROUND, what="a move")
            disk.is_full, num_moves = True, len(peer.seen("moved"))
            await place.until(
                lambda: len(peer.seen("moved")) >= num_moves + 2, within=9 * ROUND, what="moves"
            )
            assert peer.seen("path not to be had")
            assert "optimizer" in what_failed(peer)

    run_virtual(scenario())


@pytest.mark.parametrize("blocking", [True, False])
def test_scores_that_the_disk_does_not_take_are_offered_once_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    """It is tried once a slot, and training goes on."""
    routing = RoutingConfig(
        method="discriminative", prefix_tokens=4, router_fraction=0.1, phases=(1,)
    )

    async def scenario() -> None:
        rounds = replace(CONFIG.rounds, blocking=blocking)
        async with lab(tmp_path, replace(CONFIG, routing=routing, rounds=rounds)) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            add = BlobStore.add

            def limited(store: BlobStore, data: bytes) -> str:
                if data in scores and len(refused) < 3:
                    refused.append(peer.keeper.node.slot)
                    raise full_disk()
                return add(store, data)

            monkeypatch.setattr(BlobStore, "add", limited)
            await place.until(lambda: bool(peer.seen("scored")), within=9 * ROUND, what="scores")
            assert what_failed(peer) == {"scores"}
            assert refused == list(range(refused[0], refused[0] + 3))
            assert {entry["slot"] for entry in peer.seen("training")} > set(refused)

    scores: list[bytes] = []
    refused: list[int] = []

    def noted(values: Tensor) -> bytes:
        scores.append(encode_scores(values))
        return scores[-1]

    monkeypatch.setattr("peer.scoring.encode_scores", noted)
    run_virtual(scenario())


@pytest.mark.parametrize("fault", ["at its limit", "full"])
def test_an_outer_gradient_that_the_disk_does_not_take_is_in_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    config = replace(CONFIG, topology=TopologyConfig(levels=(1,)))

    async def scenario() -> None:
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            peer, other = [await place.join(name) for name in ("peer", "other")]
            await place.until_versions(1, [peer, other], within=5 * ROUND)
            store, before = peer.keeper.node.store, peer.seen("committed")

            def refuse(*_: object) -> None:
                raise full_disk()

            with monkeypatch.context() as patch:
                if fault == "full":
                    patch.setattr(store, "_write", refuse)
                else:
                    patch.setattr(store, "limit_bytes", 1)
                await place.until(
                    lambda: sum(e["where"] == "contribution" for e in peer.seen("error")) > 3,
                    within=5 * ROUND,
                    what="refused contributions",
                )
            assert peer.seen("committed") == before
            since = peer.keeper.node.slot
            await place.until(
                lambda: any(
                    peer.peer_id in entry["contributors"] and entry["slot"] > since
                    for entry in other.seen("version")
                ),
                within=5 * ROUND,
                what="a version that counts the peer",
            )

    run_virtual(scenario())
