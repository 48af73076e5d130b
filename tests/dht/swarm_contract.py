"""What every `dht.swarm.Swarm` promises, checked on whichever implementation is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dht.errors import Unreachable
from dht.records import Announcement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dht.swarm import Swarm


def announcement(peer_id: str, round_number: int) -> Announcement:
    return Announcement(run="run", path="0.1", peer=peer_id, round=round_number)


async def check_swarm(swarms: Sequence[Swarm]) -> None:
    """At least two peers, who find each other's records at once, and see them change and go."""
    writer, *others = swarms
    record = announcement(writer.peer_id, 1)
    assert await writer.read(record.key) == []
    for swarm in swarms:
        assert await swarm.store(announcement(swarm.peer_id, 1), 60)
    for swarm in swarms:
        expected = sorted(other.peer_id for other in swarms)
        assert [found.peer for found in await swarm.read(record.key)] == expected
        assert await swarm.read("dipaco/1/run/announcement/9") == []

    renewed = announcement(writer.peer_id, 2)
    assert await writer.store(renewed, 10), "a shorter lifetime replaces a longer one, too"
    for other in others:
        assert renewed in await other.read(record.key)

    await writer.withdraw(renewed)
    for swarm in swarms:
        found = await swarm.read(record.key)
        assert [record.peer for record in found] == sorted(other.peer_id for other in others)
    assert await writer.store(announcement(writer.peer_id, 3), 10), "it may come back"
    assert announcement(writer.peer_id, 3) in await others[0].read(record.key)

    with pytest.raises(ValueError, match="lives between"):
        await writer.store(record, 601)
    with pytest.raises(ValueError, match="cannot sign"):
        await writer.store(announcement(others[0].peer_id, 1), 10)


async def check_closed_swarm(swarm: Swarm) -> None:
    await swarm.close()
    await swarm.close()
    with pytest.raises(Unreachable):
        await swarm.read("dipaco/1/run/announcement/0")
    with pytest.raises(Unreachable):
        await swarm.store(announcement(swarm.peer_id, 1), 10)
