"""Counts the messages of the DHT, which hivemind sends past our own transport.

It wraps what hivemind's control client has for its unary calls; `tests/swarm` fails when a release
of hivemind sends them by another way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

OnCall = Callable[[int, int], None]
"""Told of every exchange of messages with another node: (bytes sent, bytes received)."""

Handler = Callable[[bytes, Any], Awaitable[bytes]]


def watch_calls(control: Any, on_call: OnCall) -> None:  # noqa: ANN401
    """Tell `on_call` of the calls that go through hivemind's `ControlClient` from now on.

    Call it when the handlers are there; those added later are not counted.
    """
    call: Callable[[object, str, bytes], Awaitable[bytes]] = control.call_unary_handler

    async def counted_call(peer_id: object, proto: str, data: bytes) -> bytes:
        answer = b""
        try:
            answer = await call(peer_id, proto, data)
        finally:
            on_call(len(data), len(answer))
        return answer

    control.call_unary_handler = counted_call
    for proto, handler in list(control.unary_handlers.items()):
        control.unary_handlers[proto] = _counted(handler, on_call)


def _counted(handler: Handler, on_call: OnCall) -> Handler:
    async def counted(data: bytes, peer_id: object) -> bytes:
        answer = b""
        try:
            answer = await handler(data, peer_id)
        finally:
            on_call(len(answer), len(data))
        return answer

    return counted
