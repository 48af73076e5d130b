"""A TCP proxy that is a bad line: latency, jitter, rate, cuts, black holes, slow readers.

It stands before the address of one p2pd, which announces the proxy's instead:

    async with FaultProxy(seed=1) as proxy:
        peer = await start_peer(..., config=proxy.behind)
        proxy.line = Line(latency_seconds=0.05, cut_after_bytes=(2**14, 2**23))

`line` may change at any time; connections take it up at their next part, cuts at their beginning.
What it does wrong comes from its seed, and is counted in `faults`.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dht.daemon import DaemonConfig

if TYPE_CHECKING:
    from typing import Self

PART_BYTES = 64 * 1024  # forwarded at a time
IN_FLIGHT_PARTS = 32  # between the two ends, as a long line would hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """How a connection fares, in either direction."""

    latency_seconds: float = 0.0
    jitter_seconds: float = 0.0  # more, evenly distributed; nothing overtakes
    bytes_per_second: float = math.inf  # a few make a slow reader
    cut_after_bytes: tuple[int, int] | None = None  # both ways together, evenly distributed


class FaultProxy:
    """An async context manager: what connects to its port is forwarded to the one behind it."""

    def __init__(self, *, seed: int = 0, line: Line = Line()) -> None:
        self.line = line
        self.num_connections = 0
        self.faults: Counter[str] = Counter()
        self.forwarded_bytes: Counter[str] = Counter()  # "up" to the target, "down" from it
        self._random = random.Random(seed)
        self._is_open = asyncio.Event()  # not while partitioned
        self._is_open.set()
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = int(self._server.sockets[0].getsockname()[1])
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._target_port = int(free.getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.cut()

    @property
    def behind(self) -> DaemonConfig:
        """How a p2pd is to run so that others reach it through this proxy only."""
        return DaemonConfig(
            host_maddrs=(f"/ip4/127.0.0.1/tcp/{self._target_port}",),
            announce_maddrs=(f"/ip4/127.0.0.1/tcp/{self._port}",),
        )

    def partition(self) -> None:
        """Become a black hole: nothing arrives, nothing is refused, no connection ends."""
        self.faults["partition"] += 1
        self._is_open.clear()

    def heal(self) -> None:
        """Deliver what waited, and go on."""
        self._is_open.set()

    async def cut(self) -> None:
        """End every connection now, as if a router had lost them."""
        connections = list(self._connections)
        self.faults["cut"] += len(connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until one side ends it or its time has come."""
        try:
            await self._is_open.wait()
            there = await asyncio.open_connection("127.0.0.1", self._target_port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        self.num_connections += 1
        span = self.line.cut_after_bytes
        budget = _Budget(self._random.randint(*span) if span else None)
        directions = [
            asyncio.ensure_future(self._forward("up", reader, there[1], budget)),
            asyncio.ensure_future(self._forward("down", there[0], writer, budget)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            self.faults["cut"] += budget.is_spent
        finally:
            for direction in directions:
                direction.cancel()
            for end in (writer, there[1]):
                end.transport.abort()  # at once: what is not yet sent is lost, as on a bad line
            await asyncio.gather(*directions, return_exceptions=True)

    async def _forward(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        budget: _Budget,
    ) -> None:
        """One direction of a connection: what is read is on its way before it arrives."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT_PARTS)
        delivering = asyncio.ensure_future(self._deliver(name, line, writer, budget))
        reading = asyncio.ensure_future(self._read(reader, line))
        try:
            await asyncio.wait({delivering, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not delivering.done():  # the sender has ended: what it sent still arrives
                await delivering
        finally:
            for task in (delivering, reading):
                task.cancel()
            await asyncio.gather(delivering, reading, return_exceptions=True)

    async def _read(
        self, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        arrival_time = free_time = 0.0
        with suppress(OSError):
            while part := await reader.read(PART_BYTES):
                free_time = max(free_time, loop.time()) + len(part) / self.line.bytes_per_second
                jitter_seconds = self._random.uniform(0, self.line.jitter_seconds)
                delay_seconds = self.line.latency_seconds + jitter_seconds
                arrival_time = max(arrival_time, free_time + delay_seconds)
                await line.put((arrival_time, part))
        await line.put((arrival_time, b""))

    async def _deliver(
        self,
        name: str,
        line: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        budget: _Budget,
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while not budget.is_spent:
                arrival_time, part = await line.get()
                if (seconds := arrival_time - loop.time()) > 0:
                    await asyncio.sleep(seconds)
                await self._is_open.wait()
                if not part:
                    return
                part = budget.spend(part)
                self.forwarded_bytes[name] += len(part)
                writer.write(part)
                await writer.drain()


class _Budget:
    """The bytes that a connection may still carry before it is cut; None is no limit."""

    def __init__(self, num_bytes: int | None) -> None:
        self._num_bytes = num_bytes

    @property
    def is_spent(self) -> bool:
        return self._num_bytes == 0

    def spend(self, part: bytes) -> bytes:
        """As much of `part` as is left to carry."""
        if self._num_bytes is None:
            return part
        part = part[: self._num_bytes]
        self._num_bytes -= len(part)
        return part
