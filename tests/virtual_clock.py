"""An asyncio loop whose clock jumps to the next timer when nothing is ready to run.

So simulated hours pass in seconds, in the same order every time. Threads and sockets are not
seen: with nothing to run and no timer left the program is stuck, and that raises `DeadlockError`.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


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

    def time(self) -> float:
        return self._jumping.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, under a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
