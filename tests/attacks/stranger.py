"""A stranger among the peers of a run: what it can say, and what is looked at afterwards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dht.memory import MemorySwarm
from dht.records import Head
from dipaco.compression import encode
from dipaco.config import TopologyConfig
from dipaco.topology import ModuleID
from peer.blob_server import BLOB_PROTOCOL, BlobServer
from peer.courier import Courier, Kind
from peer.faults import Faults
from peer.messages import (
    Commitment,
    CommitRequest,
    Done,
    Proposal,
    Seat,
    sign,
)
from peer.store import BlobStore
from peer.transport import Transport
from tests.lab import Lab, lab
from tests.little_run import identity, little_config

ROUND_SECONDS = 20.0
MODULE = ModuleID(0, 0)
OTHER = ModuleID(1, 0)


async def serve_silently(transport: Transport) -> None:
    """Take every request for a blob, and never answer."""

    async def wait(_asker: str, _payload: bytes) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    await transport.serve(BLOB_PROTOCOL, wait, max_request_bytes=512)


class Stranger:
    """A peer with a key and no manners; it has no seat in any roster."""

    def __init__(self, place: Lab, number: int = 99) -> None:
        self.place = place
        self.key = identity(number)
        self.honest = list(place.peers.values())
        self.node = self.honest[0].keeper.node  # which it has looked over the shoulder
        self.transport = place.network.transport(self.key.peer_id)
        self.store = BlobStore(place.directory / f"stranger{number}")
        self.courier = Courier(self.transport, Faults(self.node.events))

    async def serve(self) -> None:
        await BlobServer(self.store).serve(self.transport)

    def commitment(
        self, module: ModuleID, *, value: float = 1e-3, tokens: int = 1, blob: str = ""
    ) -> Commitment:
        held = self.node.log.held[module]
        raw = encode(torch.full((self.node.log.num_parameters(module),), value), "float32")
        return sign(
            Commitment(
                peer=self.key.peer_id,
                run=self.node.run,
                manifest=self.node.manifest.digest,
                module=str(module),
                slot=self.node.slot,
                base_version=held.version,
                base_state=held.state,
                path="0.0",
                tokens=tokens,
                blob=blob or self.store.add(raw),
                blob_bytes=len(raw),
            ),
            self.key,
        )

    async def commit(self, commitment: Commitment) -> None:
        request = CommitRequest(commitments=(commitment,))
        await self.courier.ask_all(
            Done, {p.peer_id: request for p in self.honest}, Kind.COMMIT, 10.0
        )

    async def announce(self, module: ModuleID, *, version: int, certificate: str) -> None:
        head = Head(
            peer=self.key.peer_id,
            run=self.node.run,
            module=str(module),
            version=version,
            certificate=certificate,
            state=self.node.log.held[module].state,
        )
        assert await MemorySwarm(self.place.dht, self.key).store(head, 600.0)


@asynccontextmanager
async def swarm(directory: Path, *, levels: tuple[int, ...] = (1, 2)) -> AsyncIterator[Lab]:
    """A bootstrap node and a trainer for each path, late in a slot, a few versions on."""
    config = replace(
        little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=levels)
    )
    async with lab(directory, config) as place:
        await place.bootstrap()
        for number in range(config.topology.num_paths):
            await place.join(f"peer{number}", step_seconds=2.0)
        trainers = list(place.peers.values())[1:]
        await place.until_versions(2, trainers, within=10 * ROUND_SECONDS)
        node = trainers[0].keeper.node
        next_slot_time = node.history.first.slot_start(node.slot + 1)
        await asyncio.sleep(max(0.0, next_slot_time - node.now() + 0.8 * ROUND_SECONDS))
        yield place


def versions(place: Lab, module: ModuleID) -> list[int]:
    held = [p.versions().get(str(module)) for p in place.peers.values()]
    return [version for version in held if version is not None]


async def advances(place: Lab, module: ModuleID) -> None:
    """The module has two more versions, everywhere, and nobody who trains it has ended."""
    before = max(versions(place, module))
    await place.until(
        lambda: min(versions(place, module)) >= before + 2,
        within=5 * ROUND_SECONDS,
        what=f"versions of {module}",
    )
    assert not any(p.task is not None and p.task.done() for p in place.peers.values())


async def take_seat(stranger: Stranger) -> tuple[Seat, ...]:
    """Announce a head until the next roster has the stranger in it; returns that roster."""
    log = stranger.node.log
    for _ in range(12 * 4):
        held = log.held[MODULE]
        assert held.certificate is not None
        roster = held.certificate.proposal.next_roster
        if stranger.key.peer_id in {seat.peer for seat in roster}:
            return roster
        await stranger.announce(MODULE, version=held.version, certificate=held.certificate.digest)
        await asyncio.sleep(ROUND_SECONDS / 12)
    pytest.fail("it was given no seat")


def changed_proposal(stranger: Stranger, roster: tuple[Seat, ...], **changes: object) -> Proposal:
    """A proposal that is consistent in itself, of a contribution with these fields."""
    changes |= {"path": "0", "signature": ""}
    commitment = stranger.commitment(MODULE).model_copy(update=changes)
    return next_proposal(stranger, sign(commitment, stranger.key), roster)


def next_proposal(stranger: Stranger, commitment: Commitment, roster: tuple[Seat, ...]) -> Proposal:
    held = stranger.node.log.held[MODULE]
    assert held.certificate is not None
    return Proposal(
        run=stranger.node.run,
        module=str(MODULE),
        version=held.version + 1,
        parent=held.parent,
        contributions=(commitment,),
        roster=roster,
        rebuilt=roster != held.certificate.proposal.next_roster,
        next_roster=roster,
    )
