"""Who holds which module at which version, as the DHT says: rumours, read with care.

One read of a DHT may miss records, because some node did not answer in time. A roster made from a
partial read would let a minority certify alone, so what decides about rosters is the union of all
that was read lately, and being alone has to be seen several times.
"""

from collections import deque

from dht.keys import head_key
from dht.records import Head
from dht.swarm import Swarm
from dipaco.topology import ModuleID

LONELY_READS = 3  # reads without any other holder, before a peer may believe that it is alone


class Heads:
    """Reads head records, and remembers them for `memory_seconds`."""

    def __init__(self, swarm: Swarm, run: str, *, memory_seconds: float) -> None:
        self._swarm = swarm
        self._run = run
        self._memory_seconds = memory_seconds
        self._latest: dict[ModuleID, tuple[float, list[Head]]] = {}
        self._remembered: dict[ModuleID, dict[str, tuple[float, Head]]] = {}
        # By module, of each of the last reads: the newest version that another peer announced.
        self._others: dict[ModuleID, deque[int]] = {}

    async def read(self, module: ModuleID, *, max_age_seconds: float) -> list[Head]:
        """The head records of a module, read from the DHT at most `max_age_seconds` ago."""
        now = self._swarm.now()
        read_time, heads = self._latest.get(module, (float("-inf"), []))
        if 0 <= now - read_time <= max_age_seconds:  # negative after a clock was set back
            return heads
        records = await self._swarm.read(head_key(self._run, str(module)))
        heads = [record for record in records if isinstance(record, Head)]
        self._latest[module] = (now, heads)
        self._remember(module, heads, now)
        return heads

    def holders(self, module: ModuleID, version: int) -> list[Head]:
        """Everyone who announced this version lately, this peer itself included if it did.

        Who is about to give the module up counts only where nobody else has it.
        """
        now = self._swarm.now()
        found = [
            head
            for seen_time, head in self._remembered.get(module, {}).values()
            if head.version == version and 0 <= now - seen_time <= self._memory_seconds
        ]
        return [head for head in found if not head.leaving] or found

    def is_alone(self, module: ModuleID, version: int) -> bool:
        """Whether the last reads agree that nobody else holds this version or a later one.

        Who is stuck at an earlier one can neither vote nor be caught up with.
        """
        others = self._others.get(module, ())
        return len(others) == LONELY_READS and max(others) < version

    def _remember(self, module: ModuleID, heads: list[Head], now: float) -> None:
        alive = {
            peer: entry
            for peer, entry in self._remembered.get(module, {}).items()
            if 0 <= now - entry[0] <= self._memory_seconds
        }
        alive.update({head.peer: (now, head) for head in heads})
        self._remembered[module] = alive
        others = [head.version for _, head in alive.values() if head.peer != self._swarm.peer_id]
        latest = self._others.setdefault(module, deque(maxlen=LONELY_READS))
        latest.append(max(others, default=-1))
