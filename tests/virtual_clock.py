"""An asyncio loop whose clock jumps to the next timer when nothing is ready to run.

So simulated hours pass in seconds, in the same order every time. Threads and sockets are not
seen: with nothing to run and no timer left the program is stuck, and that raises `DeadlockError`.
What runs in a context with an `OWNER` can be frozen and thawed, as SIGSTOP and SIGCONT do it.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")
OWNER: ContextVar[str] = ContextVar("OWNER", default="")


class DeadlockError(AssertionError):
    """Every task waits for another one."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting, asks the clock to jump."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise DeadlockError(f"at {self.now:.3f} s: nothing can run and no timer is left")
        self.now += timeout
        return super().select(0)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Its `time()` starts at zero."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

        self._frozen: dict[str, list[asyncio.Handle]] = {}  # what waits for a thaw, by owner

    def time(self) -> float:
        return self._jumping.now

    def freeze(self, owner: str) -> None:
        """Let nothing of `owner` run any more; the clock goes on without it."""
        self._frozen[owner] = []

    def thaw(self, owner: str) -> None:
        """Let everything go on that was held back; timers that are overdue fire at once."""
        for handle in self._frozen.pop(owner):
            if isinstance(handle, asyncio.TimerHandle):
                heapq.heappush(self._scheduled, handle)
            else:
                self._ready.append(handle)

    def _run_once(self) -> None:
        if self._frozen:
            self._ready.extend(self._not_frozen([self._ready.popleft() for _ in [*self._ready]]))
            self._scheduled[:] = self._not_frozen(self._scheduled)
            heapq.heapify(self._scheduled)
        super()._run_once()

    def _not_frozen(self, handles: list[Any]) -> list[Any]:
        running = []
        for handle in handles:
            waiting = self._frozen.get(handle._context.get(OWNER, ""), running)
            waiting.append(handle)
        return running


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, under a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
