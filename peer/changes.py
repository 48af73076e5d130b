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
