"""Notices that p2pd has died or hangs, and puts another in its place: same identity, same port.

p2pd is a process of its own, and everything that crosses the network goes through it. When it is
gone, calls fail as `Unreachable` while training goes on, and within `CHECK_SECONDS +
ANSWER_SECONDS` and the time of a start the DHT node and all handlers are there again, the peers
that were connected are dialled, and this peer's records are published again.

It also keeps the DHT whole. A DHT node forgets another at the first call that fails, so a line that
was cut for seconds leaves two parts that know only their own, even where p2pd is still connected to
both: whoever is missing is looked for now and then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from dht.addresses import is_circuit
from dht.errors import LocalFault, SwarmError, Unreachable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from dht.daemon import Daemon, DaemonConfig
    from dht.kademlia import KademliaSwarm
    from peer.rpc import Libp2pTransport

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between two questions to p2pd
ANSWER_SECONDS = 3.0  # for it to answer one; an idle one takes a millisecond
TURN_SECONDS = 0.5  # in which these are counted, so that our own sleep does not count as its
REJOIN_SECONDS = 30.0  # between two attempts to find the swarm again, or a part that is missing
MAX_GREETED = 16  # at a time, of those who are missing: all have their turn within minutes
MAX_RESTARTS = 5  # one soon after another, in RESTARTS_SECONDS; then the next one waits
RESTARTS_SECONDS = 600.0
WELL_SECONDS = 20.0  # that a new p2pd answers for, before those that came before it are forgotten
MAX_KNOWN_PEERS = 32  # connected last, to be found again, beside the initial ones


Report = Callable[..., None]
"""Takes down an event and its fields, as `peer.events.EventLog.write` does."""


class Watchdog:
    """Keeps a p2pd running under a swarm and a transport, and these in the swarm.

    Enters them by `initial_peers`, and by what `known_maddrs` gives at that moment. `report` may be
    set at any time.
    """

    def __init__(
        self,
        daemon: Daemon,
        swarm: KademliaSwarm,
        transport: Libp2pTransport,
        *,
        initial_peers: Sequence[str] = (),
        known_maddrs: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.report: Report = _log_event
        self._daemon = daemon
        self._swarm = swarm
        self._transport = transport
        self._initial_peers = initial_peers
        self._known_maddrs = known_maddrs
        self._known: dict[str, str] = {}  # peer ID -> address; the one seen last comes last
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)  # their times, of the loop
        self._busy = asyncio.Lock()  # p2pd is being asked or restarted
        self._answered_time = 0.0  # of the loop: when p2pd was last there
        self._rejoin_time = 0.0
        self._random = random.Random(swarm.peer_id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch p2pd and the DHT inside this context."""
        self._answered_time = self._rejoin_time = asyncio.get_running_loop().time()
        tasks = [
            asyncio.create_task(self._repeat(self._watch, "watch over p2pd")),
            asyncio.create_task(self._repeat(self._reunite, "search for missing peers")),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def config(self) -> DaemonConfig:
        """What p2pd runs with."""
        return self._daemon.config

    async def restart(self, config: DaemonConfig) -> None:
        """Restart p2pd because its configuration has changed.

        Raises `LocalFault` or `Unreachable`; p2pd is restarted all the same, then.
        """
        async with self._busy:
            await self._restart(config)

    async def _repeat(self, step: Callable[[], Awaitable[None]], name: str) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # unexpected, but without this watch the peer would be lost
                log.exception("unexpected error in the %s", name)
                self.report("error", where=name, why=repr(error))
                await asyncio.sleep(CHECK_SECONDS)

    async def _watch(self) -> None:
        await self._look()
        with suppress(TimeoutError):
            async with asyncio.timeout(CHECK_SECONDS):
                await self._daemon.wait()

    async def _reunite(self) -> None:
        """Greet some of those whom the DHT node does not know; nobody waits for it."""
        await asyncio.sleep(REJOIN_SECONDS)
        neighbors = self._swarm.neighbors
        if not neighbors:
            return  # then there is more to do: see `_look`
        missing = strangers(self._maddrs(), neighbors)
        with suppress(SwarmError):  # there is a next time
            await self._swarm.meet(self._random.sample(missing, min(len(missing), MAX_GREETED)))

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._busy:
            is_well = self._daemon.alive and await self._answers()
            if not is_well:
                await self._recover(self._answered_time)
        self._answered_time = now = loop.time()
        if is_well and self._restarts and now > self._restarts[-1] + WELL_SECONDS:
            self._restarts.clear()
        if not self._swarm.neighbors and now > self._rejoin_time + REJOIN_SECONDS:
            self._rejoin_time = now
            await self._rejoin()

    async def _answers(self) -> bool:
        """Ask p2pd whom it is connected to: cheap, and needed when it is gone."""
        asking = asyncio.create_task(self._swarm.connections())
        try:
            for _ in range(round(ANSWER_SECONDS / TURN_SECONDS)):
                if (await asyncio.wait({asking}, timeout=TURN_SECONDS))[0]:
                    self._remember(asking.result())
                    return True
        except Unreachable:
            pass
        finally:
            asking.cancel()
        return False

    def _remember(self, connections: dict[str, list[str]]) -> None:
        for peer_id, maddrs in connections.items():
            for maddr in maddrs:
                if "/tcp/" in maddr:
                    self._known.pop(peer_id, None)
                    self._known[peer_id] = f"{maddr}/p2p/{peer_id}"
        for peer_id in list(self._known)[:-MAX_KNOWN_PEERS]:
            del self._known[peer_id]

    async def _recover(self, answered_time: float) -> None:
        """Restart p2pd until it works, as often as is allowed."""
        loop = asyncio.get_running_loop()
        has_ended = not self._daemon.alive
        await self._swarm.lose()
        while True:
            if len(self._restarts) == MAX_RESTARTS:
                wait_seconds = self._restarts[0] + RESTARTS_SECONDS - loop.time()
                if wait_seconds > 0:
                    self.report("p2pd keeps failing", wait_seconds=round(wait_seconds))
                    await asyncio.sleep(wait_seconds)
            self._restarts.append(loop.time())
            try:
                await self._restart(self._daemon.config)
            except (LocalFault, Unreachable) as error:
                self.report("p2pd not restarted", why=str(error))
                await asyncio.sleep(CHECK_SECONDS)
            else:
                break
        self.report(
            "p2pd restarted",
            why="it had ended" if has_ended else "it did not answer",
            seconds=round(loop.time() - answered_time, 2),
        )

    async def _restart(self, config: DaemonConfig) -> None:
        await self._swarm.lose()
        await self._daemon.restart(config)
        await self._swarm.reopen()
        await self._transport.rebind(self._swarm.p2p)
        await self._rejoin()

    async def _rejoin(self) -> None:
        """Dial everyone we know of, and publish our records; later, if nobody answers."""
        try:
            await self._swarm.join(self._maddrs())
            await self._swarm.publish_again()
        except SwarmError as error:
            self.report("swarm not found again", why=str(error))

    def _maddrs(self) -> list[str]:
        """Where to find others."""
        maddrs = (*self._initial_peers, *self._known.values(), *self._known_maddrs())
        return list(dict.fromkeys(maddrs))


def strangers(maddrs: Sequence[str], neighbors: Collection[str]) -> list[str]:
    """The addresses of others than these. Not through relays: who needs one is no DHT node."""
    return [
        maddr
        for maddr in maddrs
        if not is_circuit(maddr) and maddr.rpartition("/p2p/")[-1] not in neighbors
    ]


def _log_event(event: str, **fields: object) -> None:
    log.info("%s %s", event, fields)
