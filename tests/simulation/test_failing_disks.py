"""A volunteer's disk is full, or has garbled something: it says so, and trains if it can."""

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from dht.errors import LocalFault
from dipaco.config import TopologyConfig
from peer.store import PartialBlob
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 10.0  # virtual seconds
CONFIG = little_config(num_rounds=1000, round_seconds=ROUND, blocking=False)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


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
