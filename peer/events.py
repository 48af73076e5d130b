"""A peer's own account of what it did: one JSON object a line, for people and for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

MAX_LOG_BYTES: Final = 64 * 2**20  # then the file is rotated once; an old one is dropped

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file and tells listeners; every event has `time` and `event`."""

    def __init__(self, file: Path, now: Callable[[], float]) -> None:
        self._file = file
        self._now = now
        self._listeners: list[Listener] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a", encoding="utf-8")

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def write(self, event: str, **fields: Any) -> None:
        """Log one event; fields must be JSON-able. Raises ValueError once closed."""
        entry = {"time": round(self._now(), 3), "event": event, **fields}
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()
        if self._stream.tell() > MAX_LOG_BYTES:
            self._rotate()
        for listener in self._listeners:
            listener(entry)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be logged any more."""
        return self._stream.closed

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _rotate(self) -> None:
        self._stream.close()
        self._file.replace(self._file.with_suffix(".old"))
        self._stream = self._file.open("w", encoding="utf-8")
