"""Who comes late to a long run begins where it is, or waits; never where it began."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dht.errors import NotYet, Offline
from dht.memory import MemorySwarm
from dht.records import Head, Record
from dipaco.checkpoint import ModuleState, encode_state
from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.archive import whole
from peer.catchup import MAX_FRUITLESS, TURN_SECONDS
from peer.chain_server import CHAIN_PROTOCOL
from peer.chains import STALL_SECONDS
from peer.memory import Line
from peer.messages import ChainReply, ChainRequest
from tests.lab import Lab, LabPeer, lab
from tests.little_run import identity, little_config
from tests.made_history import made_history
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
NUM_VERSIONS = 200
CONFIG = replace(
    little_config(num_rounds=1000, round_seconds=ROUND, blocking=False),
    topology=TopologyConfig(levels=(1,)),
)
LIAR = identity(400)


async def old_run(place: Lab) -> LabPeer:
    """The bootstrap node of a run that has come to `NUM_VERSIONS`."""
    peer = await place._start("bootstrap", 1, keep_all=True, trains=False)
    node, manifest = peer.keeper.node, place.run.manifest
    for raw in place.run.blobs:
        node.store.add(raw)
    for module in manifest.topology.modules:
        values = torch.full((node.log.num_parameters(module),), 0.01)
        state = node.store.add(encode_state(ModuleState.initial(values)))
        node.log.adopt(
            module,
            made_history(manifest, module, identity(50), num_versions=NUM_VERSIONS, state=state),
        )
    await peer.stack.enter_async_context(peer.keeper.running())
    return peer


async def is_counted(place: Lab, peer: LabPeer) -> None:
    """Wait until the peer's work is in a version of each of its modules."""

    def counted() -> set[str]:
        versions = place.peers["bootstrap"].seen("version")
        return {e["module"] for e in versions if peer.peer_id in e["contributors"]}

    await place.until(lambda: counted() >= {"0.0", "1.0"}, within=8 * ROUND, what="being counted")


def test_a_newcomer_on_a_slow_line_joins_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both modules' certificates come over one line, and take longer than anyone should wait for
    a peer that is silent.
    """
    monkeypatch.setattr("peer.chain_server.MAX_MESSAGE_BYTES", 16 * 1024)

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            bootstrap = await old_run(place)
            late = await place.join("late", step_seconds=2.0)
            slow = Line(bandwidth_bytes_per_second=3000.0)
            place.network.lines[late.peer_id] = slow
            begin_time = asyncio.get_running_loop().time()
            chain_bytes = sum(
                len(whole(link).to_bytes())
                for held in bootstrap.keeper.node.log.held.values()
                for link in held.chain
            )
            assert chain_bytes / slow.bandwidth_bytes_per_second > 200.0
            await place.until(
                lambda: bool(late.seen("caught up")), within=30 * ROUND, what="a module"
            )
            assert asyncio.get_running_loop().time() - begin_time > 120.0
            place.network.lines.clear()
            await place.until(lambda: bool(late.seen("path")), within=4 * ROUND, what="a path")
            assert [entry["round"] for entry in late.seen("path")] == [NUM_VERSIONS]
            await is_counted(place, late)

    run_virtual(scenario())


@pytest.mark.parametrize("is_start_here", [False, True])
def test_a_newcomer_waits_for_what_nobody_hands_out_yet(
    tmp_path: Path, *, is_start_here: bool
) -> None:
    """Also if the first version is on its disk, with which it could begin."""

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            bootstrap = await old_run(place)
            handlers = place.network.transports[bootstrap.peer_id]._handlers
            handler = handlers.pop(CHAIN_PROTOCOL)
            if is_start_here:
                await place.join("late")
                store = place.peers["late"].keeper.node.store
                for module in place.run.manifest.topology.modules:
                    store.add(encode_state(place.run.starts[module]))
                await place.kill("late")
            late = await place.join("late", step_seconds=2.0)
            await place.until(
                lambda: bool(late.seen("waiting for modules")), within=8 * ROUND, what="waiting"
            )
            reasons = {entry["why"] for entry in late.seen("path not to be had")}
            assert reasons == {
                f"module 0.0 is at version {NUM_VERSIONS} elsewhere, but nobody hands it out"
            }
            assert not late.versions()
            assert late.keeper.presence.path is None, "others would count on it"
            handlers[CHAIN_PROTOCOL] = handler
            await place.until(lambda: bool(late.seen("path")), within=4 * ROUND, what="a path")
            assert [entry["round"] for entry in late.seen("path")] == [NUM_VERSIONS]
            await is_counted(place, late)

    run_virtual(scenario())


def test_it_can_be_told_to_stop_while_it_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            bootstrap = await old_run(place)
            del place.network.transports[bootstrap.peer_id]._handlers[CHAIN_PROTOCOL]
            late = await place.join("late")
            await place.until(
                lambda: bool(late.seen("waiting for modules")), within=8 * ROUND, what="waiting"
            )
            assert late.volunteer is not None
            assert late.task is not None
            late.volunteer.stop.set()
            await asyncio.wait_for(late.task, 1.0)

    run_virtual(scenario())


def test_who_hands_out_certificates_slowly_has_its_turn_and_then_another_goes_on(
    tmp_path: Path,
) -> None:
    """It claims the most, so it is asked first; at its pace the newcomer would be hours late."""

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            held = (await old_run(place)).keeper.node.log.held
            asked: list[int] = []

            async def drip(peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
                request = ChainRequest.from_bytes(payload, sender=peer_id)
                asked.append(request.first_version)
                await asyncio.sleep(0.8 * STALL_SECONDS)
                after = held[ModuleID.parse(request.module)].after(request.first_version - 1)
                yield ChainReply(certificates=tuple(after[:1])).to_bytes()

            liar = place.network.transport(LIAR.peer_id)
            await liar.serve(CHAIN_PROTOCOL, drip, max_request_bytes=1024)
            for module in place.run.manifest.topology.modules:
                await claim(place, module, NUM_VERSIONS + 1)
            late = await place.join("late", step_seconds=2.0)
            await place.until(
                lambda: bool(late.seen("path")), within=TURN_SECONDS + 3 * ROUND, what="a path"
            )
            assert late.seen("path")[0]["round"] == NUM_VERSIONS
            assert asked

    run_virtual(scenario())


def test_a_claim_is_not_disproven_while_this_peer_cannot_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            await old_run(place)
            late = await place._start("late", 2, keep_all=False, trains=False)
            catch_up, module = late.keeper.catch_up, ModuleID(0, 0)

            async def request(*_: object, **__: object) -> bytes:
                raise Offline("p2pd is gone")

            with monkeypatch.context() as patch:
                patch.setattr(late.keeper.node.transport, "request", request)
                for _ in range(2 * MAX_FRUITLESS):
                    with pytest.raises(NotYet):
                        await catch_up.open(module)
            assert await catch_up.open(module)
            assert late.versions() == {"0.0": NUM_VERSIONS}

    run_virtual(scenario())


@pytest.mark.parametrize(
    ("claimed", "answers", "may_wait"),
    [(5, False, True), (10**9, False, False), (5, True, False)],
)
def test_one_liar_does_not_keep_a_newcomer_from_the_start_of_a_run(
    tmp_path: Path, claimed: int, *, answers: bool, may_wait: bool
) -> None:
    """It claims a version that it never hands out, or hands out nothing; nobody has any."""

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-10 * ROUND) as place:
            await place.bootstrap()
            modules = place.run.manifest.topology.modules
            if answers:
                liar = place.network.transport(LIAR.peer_id)
                await liar.serve(CHAIN_PROTOCOL, nothing, max_request_bytes=1024)
            for module in modules:
                await claim(place, module, claimed)
            late = await place.join("late", step_seconds=2.0)
            await place.until(
                lambda: bool(late.seen("path")),
                within=12 * ROUND if may_wait else ROUND,
                what="a path",
            )
            assert late.seen("path")[0]["round"] == 0
            assert bool(late.seen("waiting for modules")) == may_wait
            await is_counted(place, late)

    run_virtual(scenario())


async def nothing(peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
    yield ChainReply(certificates=()).to_bytes()


async def claim(place: Lab, module: ModuleID, version: int) -> None:
    head = Head(
        peer=LIAR.peer_id,
        run=place.run.digest,
        module=str(module),
        version=version,
        certificate="a" * 64,
        state="b" * 64,
    )
    assert await MemorySwarm(place.dht, LIAR).store(head, 600.0)


def test_who_cannot_ask_the_swarm_before_the_start_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, is_lost = MemorySwarm.read, True

    async def read_unless_lost(swarm: MemorySwarm, key: str) -> list[Record]:
        if is_lost and swarm.peer_id == identity(2).peer_id:
            raise Offline("this peer's p2pd has ended")
        return await read(swarm, key)

    monkeypatch.setattr(MemorySwarm, "read", read_unless_lost)

    async def scenario() -> None:
        nonlocal is_lost
        async with lab(tmp_path, little_config(num_rounds=3), start_in=30.0) as place:
            await place.bootstrap()
            peer = await place.join("peer")
            assert peer.peer_id == identity(2).peer_id
            await asyncio.sleep(3.0)
            is_lost = False
            await place.until(lambda: bool(peer.seen("waiting")), within=10, what="a path")
            is_lost = True
            await asyncio.sleep(3.0)
            is_lost = False
            await place.until(lambda: bool(peer.seen("version")), within=90, what="a version")

    run_virtual(scenario())
