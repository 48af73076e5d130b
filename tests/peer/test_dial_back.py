from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from peer.dial_back import (
    DIAL_BACK_PROTOCOL,
    MAX_DIAL_BACK_BYTES,
    MAX_PORTS,
    MAX_REQUESTS,
    DialBack,
    DialBackReply,
    DialBackRequest,
)
from peer.memory import MemoryNetwork
from peer.transport import RemoteError
from tests.little_run import identity
from tests.peer.dialling import Dials, FakeSwarm

if TYPE_CHECKING:
    from peer.transport import Transport

US, ASKER, OTHER = (identity(number).peer_id for number in (1, 2, 3))
OWN = [f"/ip4/127.0.0.1/tcp/1/p2p/{US}", f"/ip4/203.0.113.1/tcp/1/p2p/{US}"]
RELAY = f"/ip4/203.0.113.9/tcp/31337/p2p/{OTHER}"


async def ask(
    asker: Transport, ports: tuple[int, ...], *, protocol: str = DIAL_BACK_PROTOCOL
) -> DialBackReply:
    raw = await asker.request(
        US,
        protocol,
        DialBackRequest(ports=ports).to_bytes(),
        timeout_seconds=5,
        max_response_bytes=MAX_DIAL_BACK_BYTES,
    )
    return DialBackReply.from_bytes(raw, sender=US)


async def served(seen_at: list[str], dials: Dials, *, is_relay: bool = False) -> Transport:
    """The asker's transport, in a network where `US` dials back."""
    network = MemoryNetwork(seed=0)
    transport, asker = network.transport(US), network.transport(ASKER)
    transport.connect = dials  # type: ignore[method-assign]
    await DialBack(FakeSwarm(ASKER, seen_at, OWN), transport, is_relay=is_relay).serve()  # type: ignore[arg-type]
    return asker


def test_only_the_address_that_the_asker_is_seen_at_is_dialled() -> None:
    async def main() -> None:
        dials = Dials({"/ip4/203.0.113.7/tcp/4000": ASKER, "/ip4/203.0.113.7/tcp/22": OTHER})
        asker = await served(["/ip4/203.0.113.7/tcp/51234"], dials)
        answer = await ask(asker, (22, 4000, 4001))
        assert answer.seen == "/ip4/203.0.113.7"
        assert answer.reached == (4000,), "another key is not the asker"
        assert {maddr.rsplit("/tcp/", 1)[0] for maddr in dials.maddrs} == {"/ip4/203.0.113.7"}
        assert answer.relay == ()

    asyncio.run(main())


def test_who_is_seen_through_a_relay_is_not_dialled() -> None:
    async def main() -> None:
        dials = Dials({})
        asker = await served([f"{RELAY}/p2p-circuit"], dials, is_relay=True)
        answer = await ask(asker, (4000,))
        assert answer.seen is None
        assert dials.maddrs == []
        assert answer.relay == (f"/ip4/203.0.113.1/tcp/1/p2p/{US}",)

    asyncio.run(main())


def test_dialling_back_is_bounded() -> None:
    async def main() -> None:
        dials = Dials({})
        asker = await served(["/ip4/203.0.113.7/tcp/5"], dials)
        for _ in range(MAX_REQUESTS):
            await ask(asker, (1, 2, 3, 4))
        with pytest.raises(RemoteError, match="too often"):
            await ask(asker, (1,))
        assert len(dials.maddrs) == MAX_REQUESTS * MAX_PORTS

    asyncio.run(main())
    with pytest.raises(ValueError, match="at most 4"):
        DialBackRequest(ports=(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="greater than or equal"):
        DialBackRequest(ports=(0,))
