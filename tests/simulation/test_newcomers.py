"""Who comes late to a long run begins where it is, however slow its line."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dht.memory import MemorySwarm
from dht.records import Head
from dipaco.checkpoint import ModuleState, encode_state
from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.catchup import TURN_SECONDS
from peer.chains import STALL_SECONDS
from peer.member import CHAIN_PROTOCOL
from peer.memory import Line
from peer.messages import ChainReply, ChainRequest
from tests.lab import Lab, LabPeer, identity, lab, little_config
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
    monkeypatch.setattr("peer.member.MAX_MESSAGE_BYTES", 16 * 1024)

    async def scenario() -> None:
        async with lab(tmp_path, CONFIG, start_in=-NUM_VERSIONS * ROUND) as place:
            bootstrap = await old_run(place)
            late = await place.join("late", step_seconds=2.0)
            slow = Line(bandwidth_bytes_per_second=3000.0)
            place.network.lines[late.peer_id] = slow
            begin_time = asyncio.get_running_loop().time()
            chain_bytes = sum(
                len(certificate.to_bytes())
                for held in bootstrap.keeper.node.log.held.values()
                for certificate in held.chain
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
