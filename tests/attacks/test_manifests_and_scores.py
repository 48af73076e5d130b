"""Lies about the next manifest and about scores: a named fault, and nothing is taken or deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bootstrap.gathering import Gathering
from dht.memory import MemorySwarm
from dht.records import ManifestPointer, Scores
from dipaco.config import RoutingConfig
from dipaco.digest import blob_digest
from dipaco.discriminative import encode_scores
from dipaco.tensors import encode_tensors
from peer.blob_server import BlobServer
from peer.chunk_plan import MAX_SOURCES
from peer.discovery import MAX_CLAIMS, RUMOUR_TIMEOUT_SECONDS, choose_claims
from peer.manifest import Manifest
from peer.store import BlobStore
from tests.attacks.stranger import serve_silently
from tests.lab import Lab, LabPeer, lab
from tests.little_run import identity, little_config, make_run
from tests.peer.test_succession import next_manifest, with_levels
from tests.virtual_clock import run_virtual

CONFIG = little_config()


class Liar:
    """A peer that serves blobs, and says what it likes about them."""

    def __init__(self, place: Lab, number: int) -> None:
        self.identity = identity(number)
        self.swarm = MemorySwarm(place.dht, self.identity)
        self.store = BlobStore(place.directory / f"liar{number}")
        self.transport = place.network.transport(self.identity.peer_id)
        self.run = place.run.digest

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    async def point_to(self, digest: str, *, version: int = 2) -> None:
        record = ManifestPointer(
            peer=self.peer_id, run=self.run, name="x", version=version, manifest=digest
        )
        await self.swarm.store(record, 60.0)

    async def offer(self, raw: bytes, *, path: str = "0.0") -> None:
        blob = self.store.add(raw)
        record = Scores(peer=self.peer_id, run=self.run, path=path, phase=0, blob=blob)
        await self.swarm.store(record, 60.0)


@asynccontextmanager
async def liars(place: Lab, count: int) -> AsyncIterator[list[Liar]]:
    everyone = [Liar(place, 90 + number) for number in range(count)]
    for liar in everyone:
        await BlobServer(liar.store).serve(liar.transport)
    yield everyone
    for liar in everyone:
        await liar.transport.close()


def kinds(peer: LabPeer, culprit: str) -> set[str]:
    return set(peer.keeper.node.faults.by_peer.get(culprit, {}))


def signed_by_another(first: Manifest) -> Manifest:
    return next_manifest(first, by=identity(90))


def not_signed(first: Manifest) -> Manifest:
    return next_manifest(first).model_copy(update={"first_slot": 1})


def of_another_run(first: Manifest) -> Manifest:
    return make_run(CONFIG, operator=identity(1), start_time=7.0).manifest


def after_another_run(first: Manifest) -> Manifest:
    return next_manifest(of_another_run(first))


@pytest.mark.parametrize("lie", [signed_by_another, not_signed, of_another_run, after_another_run])
def test_a_manifest_that_is_none_is_a_fault_of_who_points_to_it(
    tmp_path: Path, lie: Callable[[Manifest], Manifest]
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            async with liars(place, 1) as [liar]:
                manifest = lie(place.run.manifest)
                liar.store.add(of_another_run(place.run.manifest).to_bytes())
                await liar.point_to(liar.store.add(manifest.to_bytes()))
                await victim.keeper.discovery.look()
                assert victim.keeper.node.history.newest == place.run.manifest
                assert kinds(victim, liar.peer_id) == {"BadMessage"}
                faults = victim.keeper.node.faults.total
                await victim.keeper.discovery.look()
                assert victim.keeper.node.faults.total == faults, "it is looked at once"

    run_virtual(scenario())


def test_a_pointer_cannot_delete_what_a_peer_holds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            async with liars(place, 1) as [liar]:
                for raw in place.run.blobs[1:]:
                    liar.store.add(raw)
                    await victim.keeper.discovery.ask(blob_digest(raw), liar.peer_id)
                    assert blob_digest(raw) in victim.keeper.node.store

    run_virtual(scenario())


def test_false_pointers_hide_the_true_one_for_a_few_looks_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            async with liars(place, 10) as everyone:
                second = next_manifest(place.run.manifest)
                honest, *others = everyone
                await honest.point_to(honest.store.add(second.to_bytes()))
                for number, liar in enumerate(others):
                    raw = b"no manifest" * (number + 1)
                    await liar.point_to(liar.store.add(raw), version=2**50)
                for _ in range(4):
                    await victim.keeper.discovery.look()
                assert victim.keeper.node.history.newest == second

    run_virtual(scenario())


def test_who_points_to_a_manifest_and_keeps_silent_costs_one_short_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            node = victim.keeper.node
            second = next_manifest(place.run.manifest)
            durations = []

            async def look() -> None:
                start = asyncio.get_running_loop().time()
                await victim.keeper.discovery.look()
                durations.append(asyncio.get_running_loop().time() - start)

            async with liars(place, MAX_CLAIMS + 1) as [honest, *others]:
                for number, liar in enumerate(others):
                    await serve_silently(liar.transport)
                    await liar.point_to(f"{number:064x}", version=2**50)
                await look()
                assert node.faults.total >= MAX_CLAIMS, "they were asked"
                assert durations[0] < RUMOUR_TIMEOUT_SECONDS + 1, "at the same time"
                await honest.point_to(honest.store.add(second.to_bytes()))
                for number, liar in enumerate(others):
                    await liar.point_to(f"{number + 100:064x}", version=2**51)
                await look()
                assert node.history.newest == second
                assert durations[1] < 1, "who had nothing to give is not heard for a while"

    run_virtual(scenario())


def test_silent_peers_that_name_the_true_manifest_hide_it_for_a_few_looks_only(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            second = next_manifest(place.run.manifest)
            async with liars(place, 3 * MAX_SOURCES + 1) as [honest, *others]:
                digest = honest.store.add(second.to_bytes())
                await honest.point_to(digest)
                for liar in others:
                    await serve_silently(liar.transport)
                    await liar.point_to(digest)
                for _ in range(4):
                    await victim.keeper.discovery.look()
                assert victim.keeper.node.history.newest == second
                assert victim.keeper.node.faults.total, "some of them were asked"

    run_virtual(scenario())


def test_two_claims_that_share_a_version_are_followed_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            second = next_manifest(place.run.manifest)
            third = next_manifest(second)
            async with liars(place, 2) as [one, two]:
                for peer in (one, two):
                    for manifest in (second, third):
                        peer.store.add(manifest.to_bytes())
                await one.point_to(second.digest)
                await two.point_to(third.digest, version=3)
                assert await victim.keeper.discovery.look()
                assert victim.keeper.node.history.newest == third
                assert [entry["version"] for entry in victim.seen("manifest")] == [2, 3]
                assert not victim.keeper.node.faults.total

    run_virtual(scenario())


def test_the_operator_is_heard_first_and_then_what_most_point_to() -> None:
    def pointer(number: int, digest: str, version: int) -> ManifestPointer:
        peer = identity(number).peer_id
        return ManifestPointer(peer=peer, run="r", name="x", version=version, manifest=digest * 64)

    strangers = [pointer(90 + number, f"{number}", 2**50) for number in range(MAX_CLAIMS)]
    honest = [pointer(number, "a", 3) for number in range(10, 10 + MAX_SOURCES + 1)]
    operators = pointer(1, "b", 2)
    claims = choose_claims([*strangers, *honest, operators], operators.peer)
    assert len(claims) == MAX_CLAIMS
    assert claims[0] == ("b" * 64, [operators.peer])
    assert claims[1] == ("a" * 64, [record.peer for record in honest[:MAX_SOURCES]])


def test_an_operator_that_signs_two_versions_is_reported_and_the_first_one_kept(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            victim = await place.bootstrap()
            first = place.run.manifest
            async with liars(place, 2) as [one, two]:
                second, other = next_manifest(first), next_manifest(first, with_levels(3, 2))
                await one.point_to(one.store.add(second.to_bytes()))
                await victim.keeper.discovery.look()
                await two.point_to(two.store.add(other.to_bytes()))
                await victim.keeper.discovery.look()
                assert victim.keeper.node.history.newest == second
                assert kinds(victim, first.peer) == {"BadMessage"}

    run_virtual(scenario())


def test_scores_are_the_median_of_what_is_none_of_it_bad(tmp_path: Path) -> None:
    routing = RoutingConfig(
        method="discriminative", prefix_tokens=4, router_fraction=0.1, phases=(1,)
    )

    async def scenario() -> None:
        async with lab(tmp_path, replace(CONFIG, routing=routing)) as place:
            operator = await place.bootstrap()
            node = operator.keeper.node
            async with liars(place, 7) as [short, wide, endless, borrowed, *three]:
                await short.offer(encode_scores(torch.zeros(9)))
                await wide.offer(encode_tensors({"scores": torch.zeros(5, dtype=torch.int64)}))
                await endless.offer(encode_scores(torch.full((10,), float("nan"))))
                await borrowed.offer(place.run.blobs[-1])  # the router data itself
                gathering = await Gathering.begin(node, place.run.manifest)
                await gathering.look()
                assert len(gathering.missing) == 4
                for liar in (short, wide, endless, borrowed):
                    assert kinds(operator, liar.peer_id) == {"BadBlob"}
                assert blob_digest(place.run.blobs[-1]) in node.store
                for value, peer in zip((-3.0, -2.0, 1e30), three, strict=True):
                    await peer.offer(encode_scores(torch.full((10,), value)))
                    for path in ("0.1", "1.0", "1.1"):
                        await peer.offer(encode_scores(torch.full((10,), value)), path=path)
                await gathering.look()
                assert not gathering.missing
                assert torch.equal(gathering.scores(), torch.full((10, 4), -2.0))

    run_virtual(scenario())
