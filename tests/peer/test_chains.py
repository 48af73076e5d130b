"""Certificates are pulled for as long as they come, and what came is there for the next attempt."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dht.errors import BadMessage, Unreachable
from dipaco.topology import ModuleID
from peer.chain_server import CHAIN_PROTOCOL
from peer.chains import STALL_SECONDS, Chains
from peer.manifest import Origin
from peer.messages import Certificate, ChainReply, ChainRequest
from tests.lab import Lab, lab
from tests.little_run import identity, little_config
from tests.made_history import made_history
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds
MODULE = ModuleID(1, 0)
PER_REPLY = 4
NUM_VERSIONS = 40


class Holder:
    """Hands out a history, a few certificates at a time, and falls silent after some replies."""

    def __init__(
        self,
        place: Lab,
        number: int,
        history: Sequence[Certificate],
        *,
        num_replies: int = 1000,
        seconds: float = 0.0,
    ) -> None:
        self.peer = identity(number).peer_id
        self.num_replies = num_replies
        self.asked: list[int] = []  # from which versions on
        self._transport = place.network.transport(self.peer)
        self._history = history
        self._seconds = seconds

    async def serve(self) -> "Holder":
        await self._transport.serve(CHAIN_PROTOCOL, self._answer, max_request_bytes=1024)
        return self

    async def _answer(self, peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        first = ChainRequest.from_bytes(payload, sender=peer_id).first_version
        self.asked.append(first)
        if len(self.asked) > self.num_replies:
            await asyncio.Event().wait()
        await asyncio.sleep(self._seconds)
        yield ChainReply(
            certificates=tuple(self._history[first - 1 : first - 1 + PER_REPLY])
        ).to_bytes()


@asynccontextmanager
async def newcomer(directory: Path) -> AsyncIterator[tuple[Lab, Chains]]:
    """Somebody who holds nothing, in a run that has been going on for long."""
    config = little_config(num_rounds=100, round_seconds=ROUND)
    async with lab(directory, config, start_in=-NUM_VERSIONS * ROUND) as place:
        node = (await place.bootstrap()).keeper.node
        yield place, Chains(node)


def history_of(place: Lab, number: int = 50, *, state: str = "e" * 64) -> list[Certificate]:
    manifest = place.run.manifest
    return made_history(manifest, MODULE, identity(number), num_versions=NUM_VERSIONS, state=state)


def test_a_pull_may_take_as_long_as_certificates_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            slow = await Holder(place, 70, history, seconds=0.9 * STALL_SECONDS).serve()
            begin_time = asyncio.get_running_loop().time()
            checked = await chains.pull(MODULE, slow.peer, [])
            assert asyncio.get_running_loop().time() - begin_time > 240.0
            assert checked is not None
            assert [c.digest for c in checked.certificates()] == [c.digest for c in history]
            silent = await Holder(place, 71, history, num_replies=0).serve()
            begin_time = asyncio.get_running_loop().time()
            with pytest.raises(Unreachable):
                await chains.pull(MODULE, silent.peer, history[:8])
            assert asyncio.get_running_loop().time() - begin_time < 2 * STALL_SECONDS

    run_virtual(scenario())


def test_what_was_checked_before_a_cut_is_not_asked_for_again(tmp_path: Path) -> None:
    """Three holders each fall silent after a few replies; whoever comes next goes on."""

    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            first, second, third = [
                await Holder(place, 70 + n, history, num_replies=replies).serve()
                for n, replies in enumerate((3, 5, 1000))
            ]
            for holder in (first, second):
                with pytest.raises(Unreachable):
                    await chains.pull(MODULE, holder.peer, [])
            checked = await chains.pull(MODULE, third.peer, [])
            assert checked is not None
            assert [c.digest for c in checked.certificates()] == [c.digest for c in history]
            assert first.asked == [1, 5, 9, 13]
            assert second.asked == [12, 16, 20, 24, 28, 32]  # the first shows that it is the same
            assert third.asked == [31, 35, 39, 41]

    run_virtual(scenario())


def test_nothing_of_a_message_with_a_bad_certificate_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            forged = [*history]
            vote = forged[9].votes[0].model_copy(update={"signature": "0" * 128})
            forged[9] = forged[9].model_copy(update={"votes": (vote,)})
            liar = await Holder(place, 70, forged).serve()
            with pytest.raises(BadMessage, match="forged"):
                await chains.pull(MODULE, liar.peer, [])
            assert chains.newest_version(MODULE) == 8
            honest = await Holder(place, 71, history).serve()
            checked = await chains.pull(MODULE, honest.peer, [])
            assert honest.asked[0] == 8
            assert checked is not None
            assert [c.digest for c in checked.certificates()] == [c.digest for c in history]

    run_virtual(scenario())


def test_other_histories_do_not_take_the_place_of_one_that_goes_on(tmp_path: Path) -> None:
    """A liar with a history of its own comes between any two attempts of the honest holder."""

    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            honest = await Holder(place, 70, history, num_replies=0).serve()
            liar = await Holder(place, 71, history_of(place, 51)).serve()
            for _ in range(NUM_VERSIONS):
                honest.num_replies = len(honest.asked) + 3
                try:
                    checked = await chains.pull(MODULE, honest.peer, [])
                    break
                except Unreachable:
                    liar.num_replies = len(liar.asked) + 3
                    with pytest.raises(Unreachable):
                        await chains.pull(MODULE, liar.peer, [])
            assert checked is not None
            assert [c.digest for c in checked.certificates()] == [c.digest for c in history]

    run_virtual(scenario())


def test_who_holds_some_versions_pulls_from_where_two_histories_part(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history, other = history_of(place), history_of(place, state="f" * 64)
            same = NUM_VERSIONS - 1
            assert [c.digest for c in history[:same]] == [c.digest for c in other[:same]]
            holder = await Holder(place, 70, history).serve()
            checked = await chains.pull(MODULE, holder.peer, history[:30])
            assert checked is not None
            assert [c.version for c in checked.certificates()] == list(range(31, 41))
            chains.forget(MODULE)
            checked = await chains.pull(MODULE, holder.peer, other)
            assert checked is not None
            assert [c.digest for c in checked.certificates()] == [history[-1].digest]
            chains.forget(MODULE)
            assert await chains.pull(MODULE, holder.peer, history) is None

    run_virtual(scenario())


def test_what_is_kept_of_one_module_is_in_no_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was born late, and is held at a few versions that the other one has behind it."""

    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            cut = await Holder(place, 70, history, num_replies=2).serve()
            with pytest.raises(Unreachable):
                await chains.pull(MODULE, cut.peer, history[:20])
            manifest, late = place.run.manifest, ModuleID(2, 0)
            versions = made_history(
                manifest, late, identity(50), num_versions=NUM_VERSIONS, state="e" * 64
            )
            born = Origin(version=36, state=manifest.starts[late.level])
            monkeypatch.setattr(chains._node.history, "origin", lambda module: born)
            holder = await Holder(place, 71, versions).serve()
            assert await chains.pull(late, holder.peer, versions[36:]) is None

    run_virtual(scenario())


def test_what_is_kept_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with newcomer(tmp_path) as (place, chains):
            history = history_of(place)
            size = len(history[0].to_bytes())
            monkeypatch.setattr("peer.chains.MAX_KEPT_BYTES", 10 * size)
            holder = await Holder(place, 70, history, num_replies=2).serve()
            with pytest.raises(Unreachable):
                await chains.pull(MODULE, holder.peer, [])
            assert chains.newest_version(MODULE) == 8
            other = await Holder(place, 71, history_of(place, 51), num_replies=2).serve()
            with pytest.raises(Unreachable):
                await chains.pull(MODULE, other.peer, [])
            assert chains.newest_version(MODULE) == PER_REPLY  # the other one's
            holder.num_replies = 1000
            checked = await chains.pull(MODULE, holder.peer, [])  # the whole is above the limit
            assert checked is not None
            assert len(checked) == NUM_VERSIONS
            assert chains.newest_version(MODULE) == 0

    run_virtual(scenario())
