"""What goes on beside training, and ends it with an error if it does."""

import asyncio
from collections.abc import Coroutine


class Beside:
    """Tasks that nobody waits for, but whose errors are raised at the next look."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def do(self, coroutine: Coroutine[object, object, object]) -> asyncio.Task[object]:
        """Begin something."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        return task

    def look(self) -> None:
        """Forget what is done; raises what went wrong."""
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()

    async def finish(self) -> None:
        """Wait until nothing is left; raises what went wrong."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            self.look()

    def cancel(self) -> None:
        """Stop everything at its next wait."""
        for task in self._tasks:
            task.cancel()
