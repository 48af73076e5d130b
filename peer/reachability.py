"""Whether others can dial this peer, asked of them; and relays for the case that they cannot.

A few peers are asked to dial back (`peer.dial_back`). Who sees the asker at a private address is in
the same network and says nothing about those outside: it counts only if nobody else answers.

Who cannot be dialled still takes part: it dials everyone itself, and libp2p uses such a connection
in both directions. For those who cannot be dialled either, it reserves a place at a relay, which is
any peer that can be dialled and is willing (`PeerConfig.relay_service`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dht.addresses import is_circuit, is_global, is_loopback, outside, ports_of, split_maddr
from dht.errors import LocalFault, PeerFault, Unreachable
from peer.dial_back import MAX_PORTS, DialBackReply, ask_to_dial_back

if TYPE_CHECKING:
    from dht.kademlia import KademliaSwarm
    from peer.transport import Transport
    from peer.watchdog import Watchdog

NUM_ASKED = 3  # peers that are asked to dial back
MAX_ASKED_FOR_RELAYS = 16  # if none of those relays
MAX_RELAYS = 3  # used at a time
RESERVATION_SECONDS = 5.0  # to get a place at a relay
RELAY_CHECK_SECONDS = 60.0  # between two looks at whether we still have it
# Between two judgements. A laptop moves to another network, a router forwards the port at last:
# this is soon enough for such things, and the few dials that it costs others are no burden.
JUDGE_SECONDS = 15 * 60.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How others reach this peer, as far as is known."""

    is_dialled: bool | None  # None: nobody could tell
    maddrs: tuple[str, ...]  # by which others reach it, each with its peer ID
    port: int | None  # that it listens on
    is_local: bool = False  # as far as peers of the same network tell, who were the only ones

    @property
    def relays(self) -> tuple[str, ...]:
        """The peer IDs of the relays that it is reached through."""
        circuits = [maddr.split("/p2p-circuit")[0] for maddr in self.maddrs if is_circuit(maddr)]
        return tuple(dict.fromkeys(maddr.rsplit("/p2p/", 1)[-1] for maddr in circuits))

    @property
    def text(self) -> str:
        """One line for the volunteer."""
        if self.is_dialled is None:
            return "nobody could tell whether others can dial you"
        if self.is_dialled and self.is_local:
            return f"reachable on this network at {', '.join(self.maddrs[:2])}"
        if self.is_dialled:
            maddrs = [maddr for maddr in self.maddrs if is_global(maddr)] or self.maddrs
            return f"reachable from outside at {', '.join(maddrs[:2])}"
        if self.relays:
            how = f"taking part through relay {', '.join(self.relays)}"
        else:
            how = "no relay was found, so those who cannot be dialled either do not reach you"
        advice = f"forward TCP port {self.port} to this machine for better throughput"
        return f"others cannot dial you: {how}" + (f"; {advice}" if self.port else "")


class Reachability:
    """Finds out how others reach this peer, and makes the best of it."""

    def __init__(self, swarm: KademliaSwarm, transport: Transport, watchdog: Watchdog) -> None:
        self._swarm = swarm
        self._transport = transport
        self._watchdog = watchdog
        self._given = watchdog.config.announce_maddrs  # by the volunteer
        self._reached: dict[str, list[str]] = {}  # ip4 or ip6 -> where we were reached last
        self._is_hidden = False  # others cannot dial us
        self._is_doubted = False  # what we know was contradicted once
        self._standing: Standing | None = None

    async def settle(self, peers: Sequence[str]) -> Standing:
        """Ask some of `peers`; if they cannot dial us, take a place at a relay that they know.

        What was found out before holds until it is contradicted twice. May restart p2pd. Raises
        `LocalFault` or `Unreachable` if that fails.
        """
        is_client = self._watchdog.config.client_mode
        ports = () if is_client else await self._ports()
        replies = await self._ask(peers[:NUM_ASKED], ports)
        counted = witnesses(list(replies.values()))
        is_dialled = False if is_client else verdict(counted)
        if self._standing is not None and not self._is_news(self._standing, is_dialled):
            return self._standing
        self._is_doubted = False
        self._is_hidden = is_dialled is False
        if is_dialled:
            await self._announce([p for p in reached(counted) if not is_loopback(p)])
        elif is_dialled is False and not await self._has_relay():
            await self._be_relayed(replies, peers)
        maddrs = outside(await self._swarm.maddrs())
        if is_dialled is False:
            maddrs = [maddr for maddr in maddrs if is_circuit(maddr)]
        self._standing = Standing(
            is_dialled=is_dialled,
            maddrs=tuple(sorted(maddrs, key=lambda maddr: (is_global(maddr), maddr))),
            port=ports[0] if ports else None,
            is_local=bool(is_dialled) and not any(is_global(reply.seen or "") for reply in counted),
        )
        return self._standing

    def _is_news(self, standing: Standing, is_dialled: bool | None) -> bool:
        """Whether to act on this verdict. Once is not enough to overturn the last one.

        To act cuts what p2pd has under way, and a dial may fail because a line was busy.
        """
        is_contradicted = standing.is_dialled not in (None, is_dialled)
        is_sure = not is_contradicted or self._is_doubted
        self._is_doubted = is_contradicted and is_dialled is not None
        return is_sure and is_dialled is not None

    async def changes(
        self, peers: Callable[[], Awaitable[Sequence[str]]]
    ) -> AsyncGenerator[Standing, None]:
        """Settle anew, for ever: now and then, and whenever the place at a relay is lost.

        Yields what came of it where that is something new.
        """
        loop = asyncio.get_running_loop()
        judged_time = loop.time()
        while True:
            await asyncio.sleep(RELAY_CHECK_SECONDS)
            try:
                is_due = self._is_doubted or loop.time() >= judged_time + JUDGE_SECONDS
                if is_due or (self._is_hidden and not await self._has_relay()):
                    judged_time, before = loop.time(), self._standing
                    standing = await self.settle(await peers())
                    if standing != before:
                        yield standing
            except (LocalFault, Unreachable):
                continue  # the watchdog is at it

    async def _ports(self) -> tuple[int, ...]:
        """Where others may try to dial us, also while p2pd, being hidden, does not say so."""
        maddrs = await self._swarm.maddrs()
        return ports_of([*maddrs, *self._given, *self._watchdog.config.host_maddrs])[:MAX_PORTS]

    async def _has_relay(self) -> bool:
        return any(is_circuit(maddr) for maddr in await self._swarm.maddrs())

    async def _places(self) -> list[str]:
        """The addresses that p2pd names, but for relays, without our peer ID."""
        maddrs = await self._swarm.maddrs()
        return [maddr.split("/p2p/")[0] for maddr in maddrs if not is_circuit(maddr)]

    async def _announce(self, places: list[str]) -> None:
        """Have p2pd name the places where we were reached, and no relays.

        This machine knows nothing of a port that a router forwards to it.
        """
        for family in {_family_of(place) for place in places}:
            self._reached[family] = [place for place in places if _family_of(place) == family]
        config = self._watchdog.config
        if not config.trusted_relays and set(places) <= set(await self._places()):
            return
        # What p2pd was told to name before may be of another network: it is asked without.
        plain = replace(config, trusted_relays=(), announce_maddrs=self._given)
        if plain != config:
            await self._watchdog.restart(plain)
        own = await self._places()
        unknown = [p for of_family in self._reached.values() for p in of_family if p not in own]
        if unknown:
            config = replace(self._watchdog.config, announce_maddrs=(*unknown, *own))
            await self._watchdog.restart(config)

    async def _be_relayed(self, replies: Mapping[str, DialBackReply], peers: Sequence[str]) -> None:
        """Take a place at a relay, if there is one."""
        relays = relays_of(replies)
        if not relays:
            relays = relays_of(await self._ask(peers[NUM_ASKED:][:MAX_ASKED_FOR_RELAYS], ()))
        if relays:
            self._reached.clear()  # refuted, and not announced any more
            config = self._watchdog.config
            config = replace(config, trusted_relays=relays, announce_maddrs=self._given)
            await self._watchdog.restart(config)
            await self._until_reserved()

    async def _ask(self, peers: Sequence[str], ports: tuple[int, ...]) -> dict[str, DialBackReply]:
        """What those of `peers` answered who did."""
        answers = await asyncio.gather(*(self._ask_one(peer, ports) for peer in peers))
        return {peer: reply for peer, reply in zip(peers, answers, strict=True) if reply}

    async def _ask_one(self, peer: str, ports: tuple[int, ...]) -> DialBackReply | None:
        try:
            return await ask_to_dial_back(self._transport, peer, ports)
        except (Unreachable, PeerFault):
            return None

    async def _until_reserved(self) -> None:
        for _ in range(round(RESERVATION_SECONDS / POLL_SECONDS)):
            if await self._has_relay():
                return
            await asyncio.sleep(POLL_SECONDS)


def witnesses(replies: Sequence[DialBackReply]) -> list[DialBackReply]:
    """Those who tried to dial us from outside; if nobody did, those who tried on our network."""
    tried = [reply for reply in replies if reply.seen is not None]
    return [reply for reply in tried if is_global(reply.seen or "")] or tried


def verdict(replies: Sequence[DialBackReply]) -> bool | None:
    """Whether others can dial us at a place of `reached`; None if there are no witnesses.

    Any of them may lie, either way. In doubt we cannot be dialled: who wrongly looks for a relay
    still dials everyone, who wrongly looks for none is out of reach of those in the same situation.
    """
    return bool(reached(replies)) if witnesses(replies) else None


def reached(replies: Sequence[DialBackReply]) -> list[str]:
    """The places at which more than half of the witnesses reached us, without our peer ID.

    A single one could name any machine, and have everyone dial it.
    """
    counted = witnesses(replies)
    named = Counter(
        f"{reply.seen}/tcp/{port}" for reply in counted for port in dict.fromkeys(reply.reached)
    )
    return [place for place, num_witnesses in named.items() if 2 * num_witnesses > len(counted)]


def _family_of(place: str) -> str:
    return place.split("/")[1]


def relays_of(replies: Mapping[str, DialBackReply]) -> tuple[str, ...]:
    """One address of each willing relay. A peer can only propose itself, where it is dialled."""
    relays = []
    for peer, reply in replies.items():
        own = [maddr for maddr in reply.relay if _is_address_of(peer, maddr)]
        relays += own[:1]
    return tuple(relays[:MAX_RELAYS])


def _is_address_of(peer: str, maddr: str) -> bool:
    try:
        where, owner = split_maddr(maddr)
    except LocalFault:
        return False
    return owner == peer and not is_circuit(where) and "," not in maddr
