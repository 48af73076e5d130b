"""Waiting for a condition to become true, with a limit, and without polling."""

import asyncio
from collections.abc import Callable


class Changes:
    """Whoever changes state calls `notify`; whoever needs it waits with `until`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Let every waiter look again."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, predicate: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until `predicate` holds; False if it does not within the time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not predicate():
                    await self._event.wait()
        except TimeoutError:
            return predicate()
        return True


async def sleep_unless(event: asyncio.Event, seconds: float) -> None:
    """Sleep, but wake up at once when `event` is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
