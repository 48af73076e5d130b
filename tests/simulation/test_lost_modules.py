"""No version is lost, and no module stops, because of who goes when, and comes back when."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dht.errors import LocalFault
from dipaco.config import RunConfig, TopologyConfig
from dipaco.digest import BlobIndex
from dipaco.topology import ModuleID
from peer.memory import Line
from peer.store import BlobStore
from tests.lab import Lab, LabPeer, lab
from tests.little_run import identity, little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
MODULE = ModuleID(0, 0)


def one_path(**rounds: object) -> RunConfig:
    config = little_config(num_rounds=1000, blocking=False, **rounds)
    return replace(config, topology=TopologyConfig(levels=(1,)))


async def train_alone(place: Lab, peers: list[LabPeer]) -> None:
    """Until all modules have some versions, and the bootstrap node has left all rosters."""
    await place.until_versions(2, peers, within=10 * ROUND)
    await place.leave("bootstrap")
    await asyncio.sleep(3 * ROUND)


@pytest.mark.parametrize(
    ("num_peers", "everyone", "slots_away"), [(2, False, 2), (3, True, 1), (3, True, 5)]
)
def test_what_was_voted_for_is_certified_however_late(
    num_peers: int, everyone: bool, slots_away: int, tmp_path: Path
) -> None:
    """Killed between a vote and its certificate, and back when the slot is long past."""

    async def scenario() -> None:
        async with lab(tmp_path, one_path()) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(num_peers)]
            await train_alone(place, peers)
            place.network.default_line = Line(latency_seconds=0.05)
            before, voted = peers[0].versions()[str(MODULE)], asyncio.Event()

            def listen(entry: dict[str, object]) -> None:
                is_of_module = entry.get("module") == str(MODULE)
                if entry["event"] == "voted" and is_of_module and not voted.is_set():
                    voted.set()

            for peer in peers:
                peer.keeper.node.events.listen(listen)
            async with asyncio.timeout(3 * ROUND):
                await voted.wait()
            voters = [p for p in peers if p.seen("voted")[-1]["version"] > before]
            victims = peers if everyone else [p for p in peers if p not in voters][:1]
            for peer in victims:
                await place.kill(peer.name)
            bound = max(p.seen("voted")[-1]["version"] for p in voters)
            assert not any(
                e["version"] >= bound and e["module"] == str(MODULE)
                for p in peers
                for e in p.seen("version")
            ), "the fault: it was certified after all"
            place.network.default_line = Line()
            await asyncio.sleep(slots_away * ROUND)
            again = {peer.name: peer for peer in peers if peer not in victims}
            place.peers |= {"": next(iter(again.values()), peers[0])}  # whom they know
            for peer in victims:
                again[peer.name] = await place.join(peer.name, through="", step_seconds=3.0)
            del place.peers[""]
            await place.until_versions(bound + 2, list(again.values()), within=8 * ROUND)

    run_virtual(scenario())


def test_everyone_comes_back_after_an_hour_with_what_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although whatever nothing refers to is deleted after minutes."""
    back = [float("inf")]
    age_seconds = BlobStore.age_seconds

    def hour_old(store: BlobStore, digest: str) -> float:
        file = store.file(digest)
        is_old = file.exists() and file.stat().st_ctime < back[0] < float("inf")
        return 3600.0 if is_old else age_seconds(store, digest)

    monkeypatch.setattr(BlobStore, "age_seconds", hour_old)

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=1000, blocking=False)) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(3)]
            await train_alone(place, peers)
            versions = {m: v for peer in peers for m, v in peer.versions().items()}
            for peer in peers:
                await place.leave(peer.name)
            await asyncio.sleep(3600)
            back[0] = time.time()
            place.peers[""] = peers[1]
            again = [await place.join(peer.name, through="", step_seconds=3.0) for peer in peers]
            del place.peers[""]
            await place.until(
                lambda: all(
                    max(peer.versions().get(m, 0) for peer in again) >= v
                    for m, v in versions.items()
                ),
                within=2 * ROUND,
                what="everything that there was",
            )

    run_virtual(scenario())


def test_who_cannot_take_new_versions_does_not_keep_the_last_trainer_from_going_on(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, one_path()) as place:
            stuck = await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(2)]
            await place.until_versions(2, peers, within=10 * ROUND)
            store = stuck.keeper.node.store
            size = store.index(stuck.keeper.node.log.held[MODULE].state).size  # type: ignore[union-attr]
            open_part = store.open_part

            def full(index: BlobIndex, data: object = None) -> object:
                if index.size > 0.6 * size:
                    raise LocalFault("the disk limit is reached")
                return open_part(index)

            store.open_part = full  # type: ignore[assignment,method-assign]
            store.hold = full  # type: ignore[assignment,method-assign]
            await asyncio.sleep(4 * ROUND)
            versions = peers[0].versions()
            assert all(stuck.versions()[m] < v for m, v in versions.items()), "the fault"
            await place.kill(peers[1].name)
            await place.until_versions(max(versions.values()) + 4, peers[:1], within=12 * ROUND)

    run_virtual(scenario())


def test_a_duty_is_not_given_up_before_others_hold_the_module(tmp_path: Path) -> None:
    """Newcomers on slow lines take the duties of the only two peers of eight paths."""

    async def scenario() -> None:
        config = little_config(num_rounds=1000, blocking=False)
        config = replace(config, topology=TopologyConfig(levels=(8,)))
        async with lab(tmp_path, config) as place:
            await place.bootstrap()
            first = [await place.join(f"peer{n}", step_seconds=ROUND / 8) for n in range(2)]
            await asyncio.sleep(6 * ROUND)
            await place.leave("bootstrap")
            await asyncio.sleep(8 * ROUND)

            def newest() -> dict[str, int]:
                peers = place.peers.values()
                return {
                    str(m): max(p.versions().get(str(m), -1) for p in peers)
                    for m in place.run.manifest.topology.modules
                }

            lowest = newest()
            assert min(lowest.values()) > 0
            for number in range(8):
                peer_id = identity(2 + len(place.numbers)).peer_id
                place.network.lines[peer_id] = Line(bandwidth_bytes_per_second=3500)
                await place.join(f"new{number}", through="peer0", step_seconds=ROUND / 8)
            retiring: set[ModuleID] = set()
            for _ in range(12):
                await asyncio.sleep(ROUND / 2)
                now = newest()
                lost = {m: v for m, v in lowest.items() if now[m] < v}
                assert not lost, "the only copies are gone"
                lowest = now
                retiring |= {m for peer in first for m in peer.keeper.member.retiring}
            assert retiring, "nobody gives a duty up"
            place.network.lines.clear()
            await place.until(
                lambda: any(peer.seen("dropped") for peer in first),
                within=8 * ROUND,
                what="a duty that is given up in the end",
            )

    run_virtual(scenario())
