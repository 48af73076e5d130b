"""The log of a peer goes on, whatever the disk does."""

import json
from io import FileIO
from pathlib import Path

import pytest

from peer import events
from peer.events import EventLog


class NearlyFull:
    """A file that takes ten bytes more."""

    closed = False

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> int:
        return self._stream.write(line[:10])


def test_what_a_full_disk_does_not_take_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    log, heard = EventLog(file, lambda: 1.0), []
    log.listen(lambda entry: heard.append(entry["event"]))
    log.write("first")
    whole = log._stream
    log._stream = NearlyFull(whole)  # type: ignore[assignment]
    log.write("second")
    log.write("third")
    log._stream = whole
    log.write("fourth")
    log.close()
    assert heard == ["first", "second", "third", "fourth"]
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["event"] for line in lines] == ["first", "fourth"]
    assert json.loads(lines[-1])["lost_before"] == 2


def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_LOG_BYTES", 1000)
    file = tmp_path / "events.jsonl"
    log = EventLog(file, lambda: 1.0)
    for number in range(100):
        log.write("event", number=number)
    log.close()
    kept = [*file.with_suffix(".old").read_text().splitlines(), *file.read_text().splitlines()]
    assert sum(len(line) + 1 for line in kept) < 2200
    numbers = [json.loads(line)["number"] for line in kept]
    assert numbers == list(range(numbers[0], 100))
