"""Dialling back: a peer asks another one whether it can be dialled, which tries that.

The asked peer opens a fresh connection to the address that it sees the asker at, and to nowhere
else, at ports that the asker names. So nobody can be made to dial a third party. It meets the
asker's key there, or it does not count.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from dht.addresses import host_of, outside
from dht.errors import Unreachable
from dht.identity import Identity
from dht.records import MAX_MADDRS, Maddr
from peer.messages import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dht.kademlia import KademliaSwarm
    from peer.transport import Transport

DIAL_BACK_PROTOCOL: Final = "/dipaco/dialback/1"
MAX_DIAL_BACK_BYTES = 4096  # of a request or its answer
MAX_PORTS = 4  # that one request may name
DIAL_BACK_SECONDS = 8.0  # for one dial
ASK_SECONDS = 3 * DIAL_BACK_SECONDS  # for an answer; others may be served first
MAX_DIALS_AT_A_TIME = 4  # for all askers together
MAX_REQUESTS = 3  # of one asker in REQUESTS_SECONDS
REQUESTS_SECONDS = 60.0
MAX_ASKERS = 256  # remembered

Port = Annotated[int, Field(ge=1, le=65535)]


class DialBackRequest(Message):
    """Please dial me back at these ports; none, to hear of relays only."""

    ports: Annotated[tuple[Port, ...], Field(max_length=MAX_PORTS)]


class DialBackReply(Message):
    """Where the asked peer sees the asker, where it reached it, and whether it relays."""

    seen: Maddr | None  # /ip4/… without a port; None through a relay
    reached: Annotated[tuple[Port, ...], Field(max_length=MAX_PORTS)]
    relay: Annotated[tuple[Maddr, ...], Field(max_length=MAX_MADDRS)]  # its addresses, if it does


async def ask_to_dial_back(
    transport: Transport, peer: str, ports: tuple[int, ...]
) -> DialBackReply:
    """Ask one peer; raises `Unreachable` or `PeerFault`."""
    raw = await transport.request(
        peer,
        DIAL_BACK_PROTOCOL,
        DialBackRequest(ports=ports).to_bytes(),
        timeout_seconds=ASK_SECONDS,
        max_response_bytes=MAX_DIAL_BACK_BYTES,
    )
    return DialBackReply.from_bytes(raw, sender=peer, max_bytes=MAX_DIAL_BACK_BYTES)


class DialBack:
    """Dials those who ask for it, within limits."""

    def __init__(self, swarm: KademliaSwarm, transport: Transport, *, is_relay: bool) -> None:
        self._swarm = swarm
        self._transport = transport
        self._is_relay = is_relay
        self._dials = asyncio.Semaphore(MAX_DIALS_AT_A_TIME)
        self._asked: OrderedDict[str, list[float]] = OrderedDict()  # peer ID -> when

    async def serve(self) -> None:
        """Answer until the transport is closed."""
        await self._transport.serve(
            DIAL_BACK_PROTOCOL, self._answer, max_request_bytes=MAX_DIAL_BACK_BYTES
        )

    async def _answer(self, asker: str, payload: bytes) -> AsyncIterator[bytes]:
        request = DialBackRequest.from_bytes(payload, sender=asker, max_bytes=MAX_DIAL_BACK_BYTES)
        if not self._may_ask(asker, time.monotonic()):
            raise ValueError("asked too often to dial back")
        seen = host_of((await self._swarm.connections()).get(asker, []))
        ports = request.ports if seen is not None else ()
        answers = await asyncio.gather(*(self._reaches(asker, f"{seen}/tcp/{p}") for p in ports))
        reached = tuple(port for port, is_there in zip(ports, answers, strict=True) if is_there)
        relay = outside(await self._swarm.maddrs())[:MAX_MADDRS] if self._is_relay else []
        yield DialBackReply(seen=seen, reached=reached, relay=tuple(relay)).to_bytes()

    def _may_ask(self, asker: str, now: float) -> bool:
        recent = [when for when in self._asked.pop(asker, []) if now - when < REQUESTS_SECONDS]
        is_allowed = len(recent) < MAX_REQUESTS
        self._asked[asker] = [*recent, now] if is_allowed else recent
        if len(self._asked) > MAX_ASKERS:
            self._asked.popitem(last=False)
        return is_allowed

    async def _reaches(self, asker: str, where: str) -> bool:
        """Whether `asker` answers a fresh connection at `where`.

        p2pd opens none to a peer that it is connected to, so a made-up one is asked for: its error
        then says whose key it met instead.
        """
        nobody = Identity(os.urandom(32)).peer_id
        try:
            async with self._dials:
                await self._transport.connect(
                    f"{where}/p2p/{nobody}", timeout_seconds=DIAL_BACK_SECONDS
                )
        except Unreachable as error:
            return asker in str(error)
        return False
