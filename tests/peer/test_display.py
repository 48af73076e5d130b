"""What a volunteer reads: what goes wrong also if quiet."""

import asyncio
import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from peer.display import Display
from peer.events import EventLog
from peer.member import Member
from peer.messages import ProposeReply
from tests.lab import lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual

ROUND = 20.0  # virtual seconds


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_is_quiet_but_for_what_goes_wrong(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(quiet=quiet)
    display.say("network", "entering")
    display.show({"event": "waiting", "seconds": 3.2})
    display.show({"event": "error", "where": "duties", "why": "the disk is full"})
    display.show({"event": "p2pd keeps failing", "wait_seconds": 3})
    display.show({"event": "growth refused", "levels": [20, 20], "why": "too few sequences"})
    display.show({"event": "scores missing", "paths": ["0.1", "1.1"]})
    shown = capsys.readouterr().err
    assert "cannot grow to levels 20, 20: too few sequences" in shown
    assert "nobody has scored the router data yet for paths 0.1, 1.1" in shown
    assert "duties: the disk is full" in shown
    assert "p2pd keeps failing" in shown
    assert ("entering" in shown, "slot 0 begins in 3 s" in shown) == (not quiet, not quiet)


class Broken(io.StringIO):
    """A stream that fails, as long as it has an `error`."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error: OSError | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(errno.EPIPE, "")])
def test_where_nothing_can_be_shown_a_peer_goes_on(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Broken(error)
    monkeypatch.setattr(sys, "stderr", stream)
    log = EventLog(tmp_path / "events.jsonl", lambda: 1.0)
    log.listen(Display().show)
    log.write("error", where="first", why="x")
    log.write("error", where="second", why="x")
    stream.error = None
    log.write("error", where="third", why="x")
    log.close()
    assert stream.getvalue().count("[error]") == 1, "what failed is not kept"
    assert "third" in stream.getvalue()


@pytest.mark.parametrize(
    ("method", "why"), [("vote", "no new version of module"), ("commit", "come without it")]
)
def test_who_trains_in_vain_is_told_so_and_why(
    method: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody votes; or, everyone does, but one peer's commitments get lost."""

    async def scenario() -> None:
        async with lab(tmp_path, little_config(num_rounds=100, blocking=False)) as place:
            await place.bootstrap()
            peers = [await place.join(f"peer{n}", step_seconds=3.0) for n in range(3)]
            await place.until_versions(2, peers, within=10 * ROUND)
            victim = peers[0]
            assert not victim.seen("not counted")
            if method == "vote":

                async def refuse(*_: Any, **__: Any) -> ProposeReply:
                    return ProposeReply(reason="no")

                monkeypatch.setattr(Member, "vote", refuse)
            else:
                committer = victim.keeper.committer
                monkeypatch.setattr(committer, "commit", lambda commitments: asyncio.sleep(0))
                monkeypatch.setattr(
                    victim.keeper.member.contributions, "known", lambda module, slot: []
                )
            await place.until(
                lambda: any(why in e["why"] for e in victim.seen("not counted")),
                within=6 * ROUND,
                what="a word about it",
            )

    run_virtual(scenario())
