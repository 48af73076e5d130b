"""The messages of rounds, batched per pair of peers.

What falls due to one peer at the same moment, for all modules that two peers share, goes out on one
stream; every answer comes back on it as soon as it is there. A batch is a sequence of

    kind (1 byte) + length (4 bytes, big-endian) + message

and each answer is a frame: number of the message in the batch (1 byte), 0 or 1 for an error (1
byte), and the answer, or the error's text.
"""

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from dht.errors import BadMessage, PeerFault, SwarmError, Unreachable
from peer.faults import Faults
from peer.messages import MAX_MESSAGE_BYTES, Message
from peer.transport import RemoteError, Transport, error_text

ROUND_PROTOCOL = "/dipaco/round/1"

GATHER_SECONDS = 0.005  # that the first message of a batch waits for others
MAX_LETTERS = 64  # in a batch
MAX_BATCH_BYTES = 2**20  # and together; what is more goes into another one
_HEADER = struct.Struct(">BI")
_ANSWER = struct.Struct(">BB")
MESSAGE_TIMEOUT_SECONDS = 10.0  # beyond what a request itself allows the other side

R = TypeVar("R", bound=Message)


class Kind(IntEnum):
    """What a message asks for."""

    COMMIT = 1
    HAVE = 2
    PROPOSE = 3
    CERTIFY = 4


Answer = Callable[[str, bytes], Awaitable[bytes]]
"""Answers (peer ID of the asker, message); what it raises becomes an error of the asker's."""


@dataclass(frozen=True, slots=True, eq=False)
class _Letter:
    kind: Kind
    message: bytes
    timeout_seconds: float
    answer: asyncio.Future[bytes]

    def to_bytes(self) -> bytes:
        return _HEADER.pack(self.kind, len(self.message)) + self.message


class Courier:
    """Asks other peers, and answers them."""

    def __init__(self, transport: Transport, faults: Faults) -> None:
        self._transport = transport
        self._faults = faults
        self._waiting: dict[str, list[_Letter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, peer: str, kind: Kind, message: bytes, *, timeout_seconds: float) -> bytes:
        """The answer of `peer`; raises as `Transport.request`."""
        letter = _Letter(kind, message, timeout_seconds, asyncio.get_running_loop().create_future())
        waiting = self._waiting.setdefault(peer, [])
        waiting.append(letter)
        if len(waiting) == 1:
            self._start(self._send_soon(peer))
        try:
            async with asyncio.timeout(timeout_seconds):
                return await letter.answer
        except TimeoutError:
            raise Unreachable(f"peer {peer} did not answer in {timeout_seconds:g} s") from None

    async def ask_as(
        self, reply_type: type[R], peer: str, kind: Kind, request: Message, timeout_seconds: float
    ) -> R | None:
        """The answer of `peer`, read; None, and a fault counted, if it does not answer rightly."""
        try:
            raw = await self.ask(peer, kind, request.to_bytes(), timeout_seconds=timeout_seconds)
            return reply_type.from_bytes(raw, sender=peer)
        except (PeerFault, Unreachable) as error:
            self._faults.count(error, peer)
            return None

    async def ask_all(
        self,
        reply_type: type[R],
        requests: Mapping[str, Message],
        kind: Kind,
        timeout_seconds: float,
    ) -> dict[str, R]:
        """Ask all at once; who does not answer rightly is missing from the result."""
        replies = await asyncio.gather(
            *(
                self.ask_as(reply_type, peer, kind, request, timeout_seconds)
                for peer, request in requests.items()
            )
        )
        return {peer: r for peer, r in zip(requests, replies, strict=True) if r is not None}

    async def serve(self, answers: Mapping[Kind, Answer]) -> None:
        """Start answering messages of every kind."""

        async def answer_all(peer: str, batch: bytes) -> AsyncGenerator[bytes, None]:
            try:
                letters = _read(batch, sender=peer)
            except BadMessage as error:
                self._faults.count(error, peer)
                raise

            async def answer(number: int, kind: Kind, message: bytes) -> bytes:
                try:
                    return _ANSWER.pack(number, 0) + await answers[kind](peer, message)
                except Exception as error:  # the task boundary: an error is an answer
                    return _ANSWER.pack(number, 1) + error_text(error)

            tasks = [
                asyncio.ensure_future(answer(number, kind, message))
                for number, (kind, message) in enumerate(letters)
            ]
            try:
                for done in asyncio.as_completed(tasks):
                    yield await done
            finally:
                for task in tasks:
                    task.cancel()

        await self._transport.serve(ROUND_PROTOCOL, answer_all, max_request_bytes=MAX_BATCH_BYTES)

    async def close(self) -> None:
        """Give up whatever is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_soon(self, peer: str) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        batch: list[_Letter] = []
        num_bytes = 0
        for letter in self._waiting.pop(peer):
            length = _HEADER.size + len(letter.message)
            if batch and (num_bytes + length > MAX_BATCH_BYTES or len(batch) == MAX_LETTERS):
                self._start(self._exchange(peer, batch))
                batch, num_bytes = [], 0
            batch.append(letter)
            num_bytes += length
        await self._exchange(peer, batch)

    async def _exchange(self, peer: str, batch: list[_Letter]) -> None:
        """Send a batch, and hand out the answers until nobody waits for one any more."""
        frames = self._transport.stream(
            peer,
            ROUND_PROTOCOL,
            b"".join(letter.to_bytes() for letter in batch),
            timeout_seconds=max(letter.timeout_seconds for letter in batch),
            max_frame_bytes=_ANSWER.size + MAX_MESSAGE_BYTES,
        )
        try:
            async with aclosing(frames):
                async for frame in frames:
                    _hand_out(frame, batch, peer)
                    if all(letter.answer.done() for letter in batch):
                        break
            raise Unreachable(f"peer {peer} did not answer")
        except Exception as error:  # the task boundary: nobody waits here, whoever asked does
            failed = error
            if not isinstance(error, SwarmError):  # such as for a name that is no peer's
                failed = Unreachable(f"peer {peer} cannot be asked: {error!r}")
                failed.__cause__ = error
            for letter in batch:
                if not letter.answer.done():
                    letter.answer.set_exception(failed)
        finally:
            for letter in batch:
                letter.answer.cancel()


def _hand_out(frame: bytes, batch: list[_Letter], peer: str) -> None:
    if len(frame) < _ANSWER.size or frame[0] >= len(batch):
        raise BadMessage(peer, "an answer to nothing that was asked")
    number, is_error = _ANSWER.unpack_from(frame)
    answer, body = batch[number].answer, frame[_ANSWER.size :]
    if answer.done():
        return  # its asker has stopped waiting
    if is_error:
        answer.set_exception(RemoteError(peer, body.decode(errors="replace")))
    else:
        answer.set_result(body)


def _read(batch: bytes, *, sender: str) -> list[tuple[Kind, bytes]]:
    """The messages of a batch; `BadMessage` if it is not one."""
    letters: list[tuple[Kind, bytes]] = []
    place = 0
    while place < len(batch):
        try:
            number, length = _HEADER.unpack_from(batch, place)
            kind = Kind(number)
        except (struct.error, ValueError) as error:
            raise BadMessage(sender, "not a batch of messages") from error
        place += _HEADER.size
        if length > min(MAX_MESSAGE_BYTES, len(batch) - place) or len(letters) == MAX_LETTERS:
            raise BadMessage(sender, "a batch that is cut off, or too many or too large messages")
        letters.append((kind, batch[place : place + length]))
        place += length
    if not letters:
        raise BadMessage(sender, "an empty batch")
    return letters
