"""Many identities commit to as much as they may: what a member knows still fits one message."""

from pathlib import Path

from dipaco.compression import encoded_bytes
from dipaco.topology import ModuleID
from peer.messages import (
    MAX_CONTRIBUTIONS,
    MAX_COUNTED,
    MAX_MESSAGE_BYTES,
    MAX_TOKENS,
    Commitment,
    HaveReply,
    Part,
    sign,
)
from peer.node import Node
from tests.lab import lab
from tests.little_run import identity, little_config
from tests.virtual_clock import run_virtual

MODULE = ModuleID(0, 0)
LIARS = [identity(200 + number) for number in range(MAX_CONTRIBUTIONS)]
PARTS = tuple(Part(peer=liar.peer_id, blob="a" * 64) for liar in LIARS)


def lie(node: Node, number: int, *, merged: tuple[Part, ...]) -> Commitment:
    """A commitment of the `number`-th liar to the module that all paths share."""
    wire_format = "int8" if merged else "int4"
    return sign(
        Commitment(
            peer=LIARS[number].peer_id,
            run=node.run,
            manifest=node.run,
            module=str(MODULE),
            slot=0,
            base_version=0,
            base_state=node.history.origin(MODULE).state.digest,
            path="0.0",
            tokens=MAX_TOKENS,
            blob="a" * 64,
            blob_bytes=encoded_bytes(wire_format, node.log.num_parameters(MODULE)),
            merged=merged,
        ),
        LIARS[number],
    )


def test_the_most_that_liars_can_commit_to_fits_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(wire_format="int4")) as place:
            keeper = (await place.bootstrap()).keeper
            node, contributions = keeper.node, keeper.member.contributions
            taken = {True: 0, False: 0}
            for merged in (True, False):
                for number in range(MAX_CONTRIBUTIONS):
                    lied = lie(node, number, merged=PARTS if merged else ())
                    sender = LIARS[number].peer_id
                    taken[merged] += contributions.add(lied, sender=sender, is_asked_for=False)
            assert taken == {True: MAX_COUNTED, False: MAX_CONTRIBUTIONS}
            known = contributions.known(MODULE, 0)
            digests = tuple(commitment.digest for commitment in known)
            reply = HaveReply(promised=True, held=digests, commitments=tuple(known))
            assert len(reply.to_bytes()) < MAX_MESSAGE_BYTES

    run_virtual(scenario())
