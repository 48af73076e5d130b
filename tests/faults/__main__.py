"""`make faults`: the kill matrix on real processes, and the same kills of hivemind's averager.

A line per fault while it runs, then the tables of docs/results.md. With `--json FILE` whatever is
in that file is not run again, so that the matrix can be run in parts. The exit code is 1 if any
fault did not end as promised; what hivemind's averager does is only told.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.faults.averager import AveragerOutcome, averager_cells, run_averager
from tests.faults.cells import STAGES_OF, Cell, Target, matrix
from tests.faults.peer_process import warm_up
from tests.faults.swarm import RECOVER_SLOTS, SLOT_SECONDS, FaultError, FaultSwarm, Outcome

LEVELS = (2, 2)
GROUPS_TITLE = "DiPaCo: what a kill or a stop costs; median and worst, seconds"
GRID_TITLE = "DiPaCo: until the next version of all modules concerned / until the victim is back, s"
AVERAGER_TITLE = "hivemind.DecentralizedAverager: three survivors of four, 48 MB"
Row = dict[str, Any]


@dataclass(kw_only=True)
class Figures:
    """What was run so far, by what it is called; kept in a file after every fault."""

    file: Path | None
    seconds: float = 0.0
    faults: dict[str, Row] = field(default_factory=dict)
    averager: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path | None) -> Figures:
        known = json.loads(file.read_text()) if file is not None and file.exists() else {}
        return cls(file=file, **known)

    def save(self) -> None:
        if self.file is not None:
            known = {"seconds": self.seconds, "faults": self.faults, "averager": self.averager}
            self.file.write_text(json.dumps(known, indent=2) + "\n")


@click.command()
@click.option("--only", default="", help="Run the faults whose description contains this.")
@click.option("--limit", type=click.IntRange(0), help="Run at most so many faults of the matrix.")
@click.option(
    "--slot-seconds",
    type=click.FloatRange(1, 600),
    default=SLOT_SECONDS,
    show_default=True,
    help="Length of a slot; a busy machine needs longer ones.",
)
@click.option("--averager/--no-averager", default=True, help="Kill hivemind's averager too.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep figures here; faults that are there are not run again.",
)
@click.option("--markdown", is_flag=True, help="Print the tables as docs/results.md has them.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep all logs here."
)
def main(
    only: str,
    limit: int | None,
    slot_seconds: float,
    averager: bool,
    json_file: Path | None,
    markdown: bool,
    keep: Path | None,
) -> None:
    """Hit a swarm with every fault of the matrix, and print what came of it."""
    console = Console(width=120)
    cells = [cell for cell in matrix() if only in str(cell)]
    figures = Figures.load(json_file)
    begin, seconds_before = time.monotonic(), figures.seconds

    def note(kind: dict[str, Row], name: object, row: Row) -> None:
        kind[str(name)] = row
        figures.seconds = round(seconds_before + time.monotonic() - begin, 1)
        figures.save()
        console.print(f"{len(kind):3d}  {name}: {text_of(row)}", highlight=False)

    todo = [cell for cell in cells if str(cell) not in figures.faults][:limit]
    broken = run_cells(
        todo,
        lambda outcome: note(figures.faults, outcome.cell, row(outcome)),
        slot_seconds=slot_seconds,
        keep=keep,
    )
    if averager:
        for one in averager_cells():
            if str(one) not in figures.averager:
                note(figures.averager, one, averager_row(run_averager(one)))
    done = [cell for cell in cells if str(cell) in figures.faults]
    for title, table in (
        (GROUPS_TITLE, list(groups(done, figures.faults))),
        (GRID_TITLE, list(grid(done, figures.faults))),
        (AVERAGER_TITLE, list(figures.averager.values())),
    ):
        console.print(as_markdown(table) if markdown else as_table(title, table), soft_wrap=True)
    failures = {str(c): failure for c in done if (failure := figures.faults[str(c)]["failure"])}
    for name, failure in failures.items():
        console.print(f"FAILED: {name}: {failure}")
    if broken:
        console.print(f"the swarm ended before its time: {broken}")
    console.print(
        f"{len(done) - len(failures)} of {len(done)} faults ended as promised, within "
        f"{RECOVER_SLOTS} slots; {len(cells) - len(done)} were not run; {figures.seconds:.0f} s"
    )
    sys.exit(1 if failures or broken else 0)


def run_cells(
    cells: Sequence[Cell],
    note: Callable[[Outcome], None],
    *,
    slot_seconds: float,
    keep: Path | None,
) -> str:
    """Run these faults in one swarm; returns why the swarm itself failed, if it did.

    Its logs stay where something failed.
    """
    if not cells:
        return ""
    warm_up()
    directory = keep or Path(tempfile.mkdtemp(prefix="faults-"))
    swarm = FaultSwarm(directory, levels=LEVELS, slot_seconds=slot_seconds)
    is_good, why = True, ""
    try:
        swarm.start()
        for cell in cells:
            outcome = swarm.run(cell)
            is_good &= not outcome.failure
            note(outcome)
        swarm.close()
    except FaultError as error:
        why = str(error)
    finally:
        swarm.kill()
    if keep is None and is_good and not why:
        shutil.rmtree(directory)
    else:
        click.echo(f"the logs are in {directory}", err=True)
    return why


def row(outcome: Outcome) -> Row:
    """One fault of the matrix as figures."""
    return {
        "victim": outcome.victim if outcome.cell.target != Target.BOOTSTRAP else "bootstrap",
        "modules": len(outcome.modules),
        "next version, s": _rounded(outcome.recover_seconds),
        "slots": outcome.recover_slots,
        "back, s": _rounded(outcome.heal_seconds),
        "failure": outcome.failure,
    }


def averager_row(outcome: AveragerOutcome) -> Row:
    """One fault of hivemind's averager as figures."""
    cell = outcome.cell
    return {
        "fault": cell.signal.name,
        "after, s": cell.after_seconds,
        "timeout": ", ".join(f"{name} {value:.0f} s" for name, value in cell.options.items()),
        "steps ended": outcome.finished,
        "said success": outcome.succeeded,
        "different states": outcome.num_states,
        "averaged": f"{outcome.averaged_share:.0%}" if outcome.finished else "",
        "s": _rounded(outcome.seconds),
        "failure": outcome.failure,
    }


def groups(cells: Sequence[Cell], rows: dict[str, Row]) -> Iterator[Row]:
    """A row for each signal and target: how many ended well, and what they took."""
    for name in dict.fromkeys(_group(cell) for cell in cells):
        group = [rows[str(cell)] for cell in cells if _group(cell) == name]
        good = [row for row in group if not row["failure"]]
        yield {
            "fault": name,
            "faults": len(group),
            "as promised": len(good),
            "next versions": _spread([row["next version, s"] for row in good]),
            "slots, worst": max((row["slots"] for row in good), default=""),
            "back": _spread([row["back, s"] for row in good]),
        }


def grid(cells: Sequence[Cell], rows: dict[str, Row]) -> Iterator[Row]:
    """A row for each role and stage, a column for each signal and target."""
    columns = list(dict.fromkeys(_group(cell) for cell in cells))
    for role, stages in STAGES_OF.items():
        for stage in stages:
            found = {_group(c): rows[str(c)] for c in cells if (c.role, c.stage) == (role, stage)}
            yield {
                "at": f"{role} {stage}",
                **{column: _pair(found[column]) if column in found else "" for column in columns},
            }


def text_of(row: Row) -> str:
    """A row as a line of progress."""
    if row["failure"]:
        return f"FAILED, {row['failure']}"
    return ", ".join(f"{name} {value}" for name, value in row.items() if value not in ("", None))


def as_table(title: str, rows: Sequence[Row]) -> Table:
    """For a terminal."""
    table = Table(title=title)
    for heading in rows[0] if rows else ():
        table.add_column(heading)
    for values in rows:
        table.add_row(*_cells(values))
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """For docs/results.md."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(_cells(values) for values in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _group(cell: Cell) -> str:
    return f"{cell.signal.name} of {cell.target}"


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else ""


def _pair(row: Row) -> str:
    return "**failed**" if row["failure"] else f"{row['next version, s']} / {row['back, s']}"


def _cells(values: Row) -> list[str]:
    return ["" if value is None else str(value) for value in values.values()]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


if __name__ == "__main__":
    main()
