"""Messages of rounds, batched per pair of peers, over the in-memory transport."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dht.errors import BadMessage, Unreachable
from peer.courier import MAX_LETTERS, ROUND_PROTOCOL, Courier, Kind
from peer.events import EventLog
from peer.faults import Faults
from peer.memory import MemoryNetwork
from peer.messages import HelloRequest
from peer.transport import RemoteError
from tests.little_run import identity
from tests.virtual_clock import run_virtual

ASKER, OTHER = identity(1).peer_id, identity(2).peer_id


class Pair:
    """Two couriers; the second one answers with the message it got, as the test likes."""

    def __init__(self, directory: Path, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        network = MemoryNetwork()
        self._log = EventLog(directory / "events.jsonl", lambda: 0.0)
        self.faults = Faults(self._log)
        self.asking_transport = network.transport(ASKER)
        self.answering_transport = network.transport(OTHER)
        self.courier = Courier(self.asking_transport, self.faults)
        self.other = Courier(self.answering_transport, self.faults)
        self.num_streams = 0
        self._answer = answer

    async def serve(self) -> None:
        async def answer(peer: str, message: bytes) -> bytes:
            assert peer == ASKER
            return await self._answer(message)

        await self.other.serve(dict.fromkeys(Kind, answer))
        stream = self.asking_transport.stream

        def counted(*arguments: object, **options: object) -> object:
            self.num_streams += 1
            return stream(*arguments, **options)  # type: ignore[arg-type]

        self.asking_transport.stream = counted  # type: ignore[method-assign, assignment]

    async def close(self) -> None:
        await self.courier.close()
        self._log.close()

    async def ask(self, message: bytes, timeout_seconds: float = 10.0) -> bytes:
        return await self.courier.ask(OTHER, Kind.HAVE, message, timeout_seconds=timeout_seconds)


def test_what_is_due_at_once_shares_a_stream_and_answers_come_one_by_one(tmp_path: Path) -> None:
    async def answer(message: bytes) -> bytes:
        if message == b"wrong":
            raise ValueError("not that one")
        await asyncio.sleep(float(message))
        return b"after " + message

    async def scenario() -> None:
        pair = Pair(tmp_path, answer)
        await pair.serve()
        loop = asyncio.get_running_loop()
        slow = asyncio.ensure_future(pair.ask(b"5"))
        wrong = asyncio.ensure_future(pair.ask(b"wrong"))
        late = asyncio.ensure_future(pair.ask(b"9", timeout_seconds=3.0))
        assert await pair.ask(b"0.5") == b"after 0.5"
        assert loop.time() < 1.0
        with pytest.raises(RemoteError, match="not that one"):
            await wrong
        with pytest.raises(Unreachable, match="did not answer in 3 s"):
            await late
        assert await slow == b"after 5"
        assert pair.num_streams == 1
        many = [pair.ask(b"0.1") for _ in range(MAX_LETTERS + 1)]
        assert set(await asyncio.gather(*many)) == {b"after 0.1"}
        assert pair.num_streams == 3
        await pair.close()

    run_virtual(scenario())


def test_who_stops_waiting_does_not_stop_the_others(tmp_path: Path) -> None:
    async def answer(message: bytes) -> bytes:
        await asyncio.sleep(1.0)
        return message

    async def scenario() -> None:
        pair = Pair(tmp_path, answer)
        await pair.serve()
        gone, staying = (asyncio.ensure_future(pair.ask(text)) for text in (b"a", b"b"))
        await asyncio.sleep(0.5)
        gone.cancel()
        assert await staying == b"b"
        await pair.close()

    run_virtual(scenario())


def test_a_name_that_is_no_peers_is_nobody_who_answers(tmp_path: Path) -> None:
    """It must not look to whoever asks as if they had been cancelled."""

    async def scenario() -> None:
        pair = Pair(tmp_path, lambda message: asyncio.sleep(0, message))
        await pair.serve()
        bogus = "1" * 40
        with pytest.raises(Unreachable, match="not the peer ID"):
            await pair.courier.ask(bogus, Kind.HAVE, b"a", timeout_seconds=10.0)
        requests = {peer: HelloRequest(protocol=1) for peer in (bogus, OTHER)}
        replies = await pair.courier.ask_all(HelloRequest, requests, Kind.HAVE, 10.0)
        assert list(replies) == [OTHER]
        assert pair.faults.by_peer == {bogus: {"Unreachable": 1}}
        await pair.close()

    run_virtual(scenario())


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x07\x00nobody asked"])
def test_an_answer_to_nothing_is_a_fault(tmp_path: Path, frame: bytes) -> None:
    async def answers(peer: str, batch: bytes) -> AsyncIterator[bytes]:
        yield frame

    async def scenario() -> None:
        pair = Pair(tmp_path, lambda message: asyncio.sleep(0, message))
        await pair.answering_transport.serve(ROUND_PROTOCOL, answers, max_request_bytes=10_000)
        with pytest.raises(BadMessage):
            await pair.ask(b"a")
        await pair.close()

    run_virtual(scenario())


def test_a_broken_batch_is_refused_and_counted(tmp_path: Path) -> None:
    letter = struct.pack(">BI", Kind.HAVE, 1) + b"x"
    batches = [
        b"",
        letter[:-1],
        letter[:3],
        b"\x09" + letter[1:],
        letter * (MAX_LETTERS + 1),
        struct.pack(">BI", Kind.HAVE, 2**31) + b"x",
    ]

    async def scenario() -> None:
        pair = Pair(tmp_path, lambda message: asyncio.sleep(0, message))
        await pair.serve()
        for batch in batches:
            with pytest.raises(RemoteError):
                await pair.asking_transport.request(
                    OTHER, ROUND_PROTOCOL, batch, timeout_seconds=5, max_response_bytes=100
                )
        assert pair.faults.by_peer[ASKER]["BadMessage"] == len(batches)
        await pair.close()

    run_virtual(scenario())
