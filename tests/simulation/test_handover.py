"""A path's optimizer follows it to its next peer; bytes that are no such thing do not."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from dipaco.config import TopologyConfig
from dipaco.moments import moments_bytes
from peer.handover import HANDOVER_PROTOCOL, MAX_REQUEST_BYTES
from peer.messages import HandoverReply
from tests.lab import LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
# Two peers take turns on three paths.
CONFIG = replace(
    little_config(num_rounds=100, blocking=False), topology=TopologyConfig(levels=(3,))
)


def on_its_path_since_it_moved(peer: LabPeer) -> bool:
    """Whether a peer that has moved has also contributed to its new path."""
    moves = peer.seen("moved")
    return bool(moves) and any(
        entry["path"] == moves[0]["path"] and entry["time"] > moves[0]["time"]
        for entry in peer.seen("contributed")
    )


def test_the_next_peer_on_a_path_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(2)]
            await place.until(
                lambda: any(peer.seen("optimizer taken over") for peer in peers),
                within=12 * ROUND,
                what="a peer that takes a path from another one",
            )
            [taker] = [peer for peer in peers if peer.seen("optimizer taken over")]
            entry = taker.seen("optimizer taken over")[0]
            [giver] = [peer for peer in peers if peer.peer_id == entry["peer"]]
            turns = [e["path"] for e in giver.seen("training")]
            assert entry["path"] in turns, "the giver has trained that path"
            assert giver is not taker
            assert entry["path"] == taker.seen("path")[-1]["path"]
            await place.until(
                lambda: taker.seen("contributed")[-1]["time"] > entry["time"],
                within=2 * ROUND,
                what="the taker's contribution",
            )
            assert taker.volunteer is not None
            trainer = taker.volunteer.training.work.trainer
            assert trainer.num_steps > entry["steps"] > 0
            assert not any(peer.seen("fault") or peer.seen("error") for peer in peers)

    run_virtual(scenario())


def test_a_peer_that_hands_over_garbage_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, CONFIG) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(2)]
            await place.until(
                lambda: all(peer.seen("path") for peer in peers), within=ROUND, what="a path each"
            )
            for peer in peers:
                node = peer.keeper.node
                topology = node.manifest.topology
                modules = topology.modules_of(topology.path_at(0))
                size = moments_bytes(sum(map(node.log.num_parameters, modules)))
                garbage = HandoverReply(blob=node.store.add(b"\xff" * size)).to_bytes()

                async def answer(
                    peer_id: str, payload: bytes, garbage: bytes = garbage
                ) -> AsyncIterator[bytes]:
                    yield garbage

                await node.transport.serve(
                    HANDOVER_PROTOCOL, answer, max_request_bytes=MAX_REQUEST_BYTES
                )
            await place.until(
                lambda: any(
                    peer.seen("fault") and on_its_path_since_it_moved(peer) for peer in peers
                ),
                within=12 * ROUND,
                what="a peer that moved, was given garbage, and has trained nevertheless",
            )
            whys = [entry["why"] for peer in peers for entry in peer.seen("fault")]
            assert all("not an optimizer's state" in why for why in whys)
            assert not any(
                peer.seen("optimizer taken over") or peer.seen("error") for peer in peers
            )

    run_virtual(scenario())
