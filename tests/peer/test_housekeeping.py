"""What is deleted from a peer's disk, and what never is."""

from pathlib import Path
from typing import Any

import pytest

from dht.keys import provider_key
from dipaco.topology import PathID
from peer.acceptor import Acceptor, Promise
from peer.housekeeping import UNREFERENCED_SECONDS
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

OWN = PathID((0, 1))


def test_only_old_blobs_that_nothing_refers_to_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages: dict[str, float] = {}
    age = UNREFERENCED_SECONDS + 1.0
    monkeypatch.setattr("peer.store.BlobStore.age_seconds", lambda _, blob: ages.get(blob, age))

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=3)) as place:
            peer = await place.join("peer", through=(await place.bootstrap()).name)
            node = peer.keeper.node
            await place.until(lambda: bool(peer.seen("version")), within=100, what="a version")
            young, old = node.store.add(b"young"), node.store.add(b"old")
            ages[young] = 1.0
            before = set(node.store.digests())
            peer.keeper._housekeeping.sweep()
            assert old not in node.store
            assert young in node.store
            assert all(held.state in node.store for held in node.log.held.values())
            gone = before.difference(node.store.digests())
            manifest = node.manifest
            assert not gone & {ref.digest for ref in (*manifest.data, *manifest.origins)}

    run_virtual(scenario())


def test_a_sweep_goes_on_while_modules_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in a thread, and the event loop does not wait for it."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            keeper = (await place.bootstrap()).keeper
            held, state, gone = keeper.node.log.held, Acceptor.state, []
            await place.until(lambda: len(held) > 1, within=100, what="some modules")

            def state_meanwhile(*args: Any) -> Promise:
                gone.append(held.popitem())
                return state(*args)

            monkeypatch.setattr(Acceptor, "state", state_meanwhile)
            num_held = len(held)
            keeper._housekeeping.sweep()
            monkeypatch.undo()
            assert len(gone) == num_held
            held.update(gone)

    run_virtual(scenario())


def test_shards_of_others_make_room_and_only_as_many_as_are_needed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            keeper = (await place.bootstrap()).keeper
            manifest, store = place.run.manifest, keeper.node.store

            def here() -> set[PathID]:
                paths = manifest.topology.paths
                return {path for path in paths if manifest.shard(path).blob.digest in store}

            everything = here()
            keeper._housekeeping.make_room(2**40, own_shard=None)
            assert here() == everything, "it is there for the others"
            keeper._housekeeping.make_room(1, own_shard=OWN)
            assert len(here()) == len(everything) - 1
            keeper._housekeeping.make_room(2**40, own_shard=OWN)
            assert here() == {OWN}

    run_virtual(scenario())


def test_a_shard_that_is_nowhere_keeps_a_peer_from_no_other_duty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    age = UNREFERENCED_SECONDS + 1.0
    monkeypatch.setattr("peer.store.BlobStore.age_seconds", lambda _, blob: age)

    async def scenario() -> None:
        async with lab(tmp_path, little_config()) as place:
            bootstrap = await place.bootstrap()
            node, manifest = bootstrap.keeper.node, place.run.manifest
            lost, *others = [manifest.shard(path).blob.digest for path in manifest.topology.paths]
            node.store.remove(lost)
            old = node.store.add(b"old")
            await place.until(lambda: old not in node.store, within=100, what="sweeping")
            for digest in others:
                assert await node.swarm.read(provider_key(digest)), "it is announced"
            places = {entry["where"] for entry in bootstrap.seen("error")}
            assert places == {f"blob {lost[:12]}"}

    run_virtual(scenario())
