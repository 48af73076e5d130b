"""What an operator reads of a swarm."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from peer.status import ModuleLine, PeerLine, SwarmStatus, status_tables


def peer_on(path: str, *, round_: int, valid_nll: float, valid_tokens: int = 256) -> PeerLine:
    return PeerLine(
        peer="12D3KooWAuhk2bSnN3m2ZrCkDkRT8xqvUFtpbBNRWZC9hPkPfEPZ",
        path=path,
        round=round_,
        tokens=1_308_900_000,
        commits=1200,
        inner_share=0.987,
        sent_bytes=12_345 * 2**20,
        received_bytes=12_345 * 2**20,
        valid_nll=valid_nll,
        valid_tokens=valid_tokens,
    )


def status_of(*peers: PeerLine) -> SwarmStatus:
    module = ModuleLine(module="0.0", version=12, state="a" * 64, holders=4, behind=1, agreed=True)
    return SwarmStatus(
        run="b" * 64,
        name="a run",
        manifest=1,
        slot=12,
        num_rounds=1000,
        num_paths=4,
        peers=peers,
        modules=(module,),
    )


def test_only_measured_paths_count_each_with_its_latest_figures() -> None:
    status = status_of(
        peer_on("0.1", round_=1, valid_nll=2000.0),
        peer_on("0.1", round_=2, valid_nll=256.0),
        peer_on("1.0", round_=3, valid_nll=0.0, valid_tokens=0),
    )
    assert set(status.measured_paths) == {"0.1"}
    assert round(status.perplexity or 0.0, 4) == 2.7183
    assert status.to_dict()["measured_paths"] == ["0.1"]
    assert status.to_dict()["num_paths"] == 4


def test_nothing_is_cut_off_at_80_columns() -> None:
    console = Console(width=80, file=StringIO())
    for table in status_tables(status_of(peer_on("0.1", round_=912, valid_nll=1400.0))):
        console.print(table)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    for shown in ("...kPfEPZ", "912/1000", "1308.90", "1200", "99%", "12345.0", "237.2"):
        assert shown in text


def test_a_module_that_nobody_holds_is_called_lost() -> None:
    gone = ModuleLine(module="0.0", version=0, state="", holders=0, behind=0, agreed=True)
    console = Console(width=80, file=StringIO())
    console.print(status_tables(replace(status_of(), modules=(gone,)))[1])
    assert isinstance(console.file, StringIO)
    assert "lost" in console.file.getvalue()
