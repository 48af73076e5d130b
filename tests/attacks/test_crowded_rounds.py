"""Many identities commit to as much as they may: what a member knows still fits one message."""

import asyncio
from pathlib import Path

from dipaco.compression import encoded_bytes
from dipaco.topology import ModuleID
from peer.contributions import MAX_PULLS, MAX_PULLS_OF_ONE
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


def lie(node: Node, number: int, *, merged: tuple[Part, ...] = (), slot: int = 0) -> Commitment:
    """A commitment of the `number`-th liar to the module that all paths share."""
    wire_format = "int8" if merged else "int4"
    return sign(
        Commitment(
            peer=LIARS[number].peer_id,
            run=node.run,
            manifest=node.run,
            module=str(MODULE),
            slot=slot,
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


def test_no_silence_keeps_anyone_from_pulling_what_is_asked_for(tmp_path: Path) -> None:
    """Whatever is offered and never comes, be it one peer's or many peers'."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config(wire_format="int4"), start_in=-1.0) as place:
            keeper = (await place.bootstrap()).keeper
            node, contributions = keeper.node, keeper.member.contributions
            pulling: list[str] = []

            async def fetch(_: str, sources: list[str], **__: object) -> None:
                pulling.append(sources[0])
                await asyncio.Event().wait()

            node.blobs.fetch = fetch  # type: ignore[assignment, method-assign]

            async def begun_by(offers: list[Commitment], *, is_asked_for: bool) -> list[str]:
                pulling.clear()
                for offer in offers:
                    contributions.add(offer, sender=offer.peer, is_asked_for=is_asked_for)
                await asyncio.sleep(0.1)
                return list(pulling)

            names = [liar.peer_id for liar in LIARS]
            later_first = [lie(node, 0, slot=slot) for slot in (2, 1, 0)]
            assert await begun_by(later_first, is_asked_for=False) == names[:1] * MAX_PULLS_OF_ONE
            offers = [lie(node, number) for number in range(1, 12)]
            assert await begun_by(offers, is_asked_for=False) == names[1 : MAX_PULLS - 1]
            asked = [*later_first, offers[-1], lie(node, 20)]
            assert await begun_by(asked, is_asked_for=True) == [names[0], names[11], names[20]]
            needed = asyncio.create_task(contributions.obtain([lie(node, 21)], [], 1.0))
            assert await begun_by([], is_asked_for=True) == [names[21]]
            assert not await needed
            await contributions.close()

    run_virtual(scenario())
