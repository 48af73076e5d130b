"""What a peer runs in the background, each task inside its boundary."""

import asyncio
from collections.abc import Coroutine

from peer.boundary import guarded
from peer.events import EventLog


class Background:
    """Tasks that run until this peer leaves; what goes wrong in one of them ends no other."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_open = False

    def open(self) -> None:
        """From now on, `start` starts."""
        self.is_open = True

    def start(self, coroutine: Coroutine[object, object, object], name: str) -> None:
        """Run something in the background, or not at all if this is not open."""
        if not self.is_open:
            coroutine.close()
            return
        task = asyncio.create_task(guarded(coroutine, name, self._events))
        # It may be cancelled before it begins.
        task.add_done_callback(lambda _: coroutine.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up all that is under way, and start no more."""
        self.is_open = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
