"""What a volunteer has done, and what its time went into."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

INNER_STEPS = "inner steps"


class Tally:
    """Inner steps, tokens and wall time since the first inner step."""

    def __init__(self, *, slot: int) -> None:
        self.counted_slot = slot  # the last of which anything was counted; at first, when it began
        self.steps = 0
        self.tokens = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by what was done in them
        self._first_step_time: float | None = None

    def begin(self, now: float) -> bool:
        """Note that an inner step begins; whether it is the first one."""
        is_first = self._first_step_time is None
        if is_first:
            self._first_step_time = now
        return is_first

    def trained(self, *, steps: int, tokens: int, seconds: float) -> None:
        """Count inner steps that are done."""
        self.steps += steps
        self.tokens += tokens
        self.seconds[INNER_STEPS] += seconds

    @contextmanager
    def instead(self, what: str) -> Iterator[None]:
        """The body takes time in which there could have been inner steps."""
        begin = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - begin

    def inner_share(self, now: float) -> float:
        """Share of the wall time since the first inner step that was spent in inner steps."""
        elapsed = 0.0 if self._first_step_time is None else now - self._first_step_time
        return min(1.0, self.seconds[INNER_STEPS] / elapsed) if elapsed > 0 else 0.0

    @property
    def tokens_per_second(self) -> int:
        """Of inner steps alone."""
        return round(self.tokens / max(self.seconds[INNER_STEPS], 1e-9))
