"""A peer's own account of what it did: one JSON object a line, for people and for tests."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

MAX_LOG_BYTES: Final = 64 * 2**20  # then the file is rotated once; an old one is dropped

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file and tells listeners; every event has `time` and `event`.

    What the disk does not take is lost from the file, and counted: a peer does not end, and no loop
    of it, because it cannot say what it did.
    """

    def __init__(self, file: Path, now: Callable[[], float]) -> None:
        self._file = file
        self._now = now
        self._listeners: list[Listener] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("ab", buffering=0)  # a line that fails is not tried again
        self._num_lost = 0  # events since the last one that was written

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def write(self, event: str, **fields: Any) -> None:
        """Log one event; fields must be JSON-able. Raises ValueError once closed."""
        entry = {"time": round(self._now(), 3), "event": event, **fields}
        self._append(entry)
        for listener in self._listeners:
            listener(entry)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be logged any more."""
        return self._stream.closed

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _append(self, entry: dict[str, Any]) -> None:
        lost = {"lost_before": self._num_lost} if self._num_lost else {}
        line = json.dumps(entry | lost).encode() + b"\n"
        if lost:
            line = b"\n" + line  # after what there is of the line that did not fit
        try:
            if self._stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._num_lost = 0
            if self._stream.tell() > MAX_LOG_BYTES:
                self._rotate()
        except OSError:
            self._num_lost += 1

    def _rotate(self) -> None:
        self._file.replace(self._file.with_suffix(".old"))
        full, self._stream = self._stream, self._file.open("ab", buffering=0)
        full.close()
