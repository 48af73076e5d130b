"""The first words between two peers: which run, which protocol, what time.

Asked before anything else, because each wrong answer has one clear sentence for the person who
typed the address, and later none of them has.
"""

from collections.abc import AsyncIterator
from typing import Final

from peer.messages import PROTOCOL_VERSION, HelloReply, HelloRequest
from peer.node import Node
from peer.transport import Transport

HELLO_PROTOCOL: Final = "/dipaco/hello"  # without a version: it is how versions are compared
HELLO_TIMEOUT_SECONDS = 10.0
MAX_HELLO_BYTES = 1024


async def serve_hello(node: Node) -> None:
    """Answer whoever knocks."""

    async def answer(peer_id: str, payload: bytes) -> AsyncIterator[bytes]:
        HelloRequest.from_bytes(payload, sender=peer_id, max_bytes=MAX_HELLO_BYTES)
        yield HelloReply(
            protocol=PROTOCOL_VERSION,
            run=node.run,
            manifest=node.history.newest.digest,
            now=node.now(),
        ).to_bytes()

    await node.transport.serve(HELLO_PROTOCOL, answer, max_request_bytes=MAX_HELLO_BYTES)


async def say_hello(transport: Transport, peer_id: str) -> HelloReply:
    """Ask one peer; raises `Unreachable` or `PeerFault`."""
    raw = await transport.request(
        peer_id,
        HELLO_PROTOCOL,
        HelloRequest(protocol=PROTOCOL_VERSION).to_bytes(),
        timeout_seconds=HELLO_TIMEOUT_SECONDS,
        max_response_bytes=MAX_HELLO_BYTES,
    )
    return HelloReply.from_bytes(raw, sender=peer_id, max_bytes=MAX_HELLO_BYTES)


def clock_skew_seconds(reply: HelloReply, *, asked_at: float, answered_at: float) -> float:
    """How far our clock is ahead of theirs; 0 as far as the round trip can explain it."""
    if reply.now < asked_at:
        return asked_at - reply.now
    return min(0.0, answered_at - reply.now)
