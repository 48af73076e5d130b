"""`make faults`: the kill matrix on real processes, and the same kills of hivemind's averager.

A line per fault while it runs, then the tables of docs/results.md. The exit code is 1 if any fault
of the matrix did not end as promised; what hivemind's averager does is only told.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.faults.averager import AveragerOutcome, averager_cells, run_averager
from tests.faults.cells import Cell, Target, matrix
from tests.faults.peer_process import warm_up
from tests.faults.swarm import RECOVER_SLOTS, SLOT_SECONDS, FaultError, FaultSwarm, Outcome

LEVELS = (2, 2)
TITLE = "DiPaCo: what a kill or a stop costs"
AVERAGER_TITLE = "hivemind.DecentralizedAverager: three survivors of four, 48 MB"
Row = dict[str, Any]


@click.command()
@click.option("--only", default="", help="Run the faults whose description contains this.")
@click.option(
    "--slot-seconds",
    type=click.FloatRange(1, 600),
    default=SLOT_SECONDS,
    show_default=True,
    help="Length of a slot; a busy machine needs longer ones.",
)
@click.option("--averager/--no-averager", default=True, help="Kill hivemind's averager too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--markdown", is_flag=True, help="Print the tables as docs/results.md has them.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep all logs here."
)
def main(
    only: str,
    slot_seconds: float,
    averager: bool,
    json_file: Path | None,
    markdown: bool,
    keep: Path | None,
) -> None:
    """Hit a swarm with every fault of the matrix, and print what came of it."""
    console = Console(width=120)
    cells = [cell for cell in matrix() if only in str(cell)]
    begin = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        outcomes, failure = run_cells(keep or Path(directory), cells, console, slot_seconds)
    rows = [row(outcome) for outcome in outcomes]
    averager_rows = run_averager_cells(console) if averager else []
    for title, table in ((TITLE, rows), (AVERAGER_TITLE, averager_rows)):
        if markdown:
            console.print(as_markdown(table), soft_wrap=True)
        else:
            console.print(as_table(title, table))
    seconds = round(time.monotonic() - begin)
    num_kept = sum(not outcome.failure for outcome in outcomes)
    if failure:
        console.print(f"the swarm ended before its time: {failure}")
    console.print(
        f"{num_kept} of {len(cells)} faults ended as promised, within {RECOVER_SLOTS} slots; "
        f"{seconds} s in all"
    )
    if json_file is not None:
        figures = {"seconds": seconds, "faults": rows, "averager": averager_rows}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if num_kept == len(cells) and not failure else 1)


def run_cells(
    directory: Path, cells: Sequence[Cell], console: Console, slot_seconds: float
) -> tuple[list[Outcome], str]:
    """All outcomes, and why the swarm itself failed if it did."""
    outcomes: list[Outcome] = []
    swarm = FaultSwarm(directory, levels=LEVELS, slot_seconds=slot_seconds)
    try:
        swarm.start()
        for number, cell in enumerate(cells):
            outcomes.append(swarm.run(cell))
            console.print(f"{number + 1:3d}/{len(cells)}  {line(outcomes[-1])}")
        swarm.close()
    except FaultError as error:
        return outcomes, str(error)
    finally:
        swarm.kill()
    return outcomes, ""


def run_averager_cells(console: Console) -> list[Row]:
    """The second table, a line of progress each."""
    rows = []
    for number, cell in enumerate(averager_cells()):
        outcome = run_averager(cell)
        rows.append(averager_row(outcome))
        console.print(f"{number + 1:3d}  averager, {cell}: {rows[-1]}", highlight=False)
    return rows


def line(outcome: Outcome) -> str:
    """One outcome as a line of progress."""
    if outcome.failure:
        return f"{outcome.cell}: FAILED, {outcome.failure}"
    of_bootstrap = outcome.cell.target == Target.BOOTSTRAP
    return (
        f"{outcome.cell}: {len(outcome.modules)} modules went on after "
        f"{outcome.recover_seconds:.1f} s, {Target.BOOTSTRAP if of_bootstrap else outcome.victim} "
        f"back after {outcome.heal_seconds:.1f} s"
    )


def row(outcome: Outcome) -> Row:
    """One fault of the matrix as figures."""
    cell = outcome.cell
    return {
        "fault": cell.signal.name + ("" if cell.kills else f", {cell.stop_slots} slots"),
        "of": str(cell.target),
        "role": str(cell.role),
        "stage": cell.stage,
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


def _cells(values: Mapping[str, Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values.values()]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


if __name__ == "__main__":
    main()
