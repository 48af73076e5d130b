"""`make demo`: a whole run on this machine, with a kill, a late joiner, and no server at the end.

Prepares a run from text that every Python installation has, starts one bootstrap node and four
volunteers over real libp2p on loopback, kills one with SIGKILL, lets another join late, stops the
bootstrap node, and compares what came out with a dense model of one path's size.

Exit code 0 only if all holders agree on every module, their event logs show a sound history, every
module advanced after the kill, and the whole model beats both its start and the dense model.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dipaco.dense import evaluate_dense, train_dense
from dipaco.rounds import Evaluations
from dipaco.start import Start
from examples.demo_report import print_report, report, verdicts
from examples.demo_volunteer import BIN, LOOPBACK, WORK, Volunteer, newest_versions

EXAMPLES = Path(__file__).parent
START_IN_SECONDS = 22  # for four volunteers to start on two cores
END_GRACE_SLOTS = 5  # beyond the last round, for rounds that a kill delayed


class Demo:
    """The story, told in a table that is redrawn while it happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start_time = time.monotonic()
        self.swarm_time = self.start_time
        self.start: Start | None = None
        self.bootstrap: subprocess.Popen[bytes] | None = None
        self.volunteers: list[Volunteer] = []
        self.notes: list[str] = []
        self.versions_at_kill: dict[str, int] = {}

    def note(self, text: str) -> None:
        """Something happened that the reader should know."""
        self.notes.append(f"{time.monotonic() - self.start_time:5.0f} s  {text}")

    def prepare(self) -> None:
        """Corpus to manifest, with the progress bars of the command itself."""
        self.console.rule("1. prepare: corpus, tokenizer, dense start, router, shards")
        config_file = EXAMPLES / "demo.toml"
        command = [str(BIN / "dipaco-bootstrap"), "prepare", str(config_file), str(WORK / "run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        start = Start.load(WORK / "run" / "start")
        everything = replace(start.config.rounds, eval_sequences=10**6)
        self.start = replace(start, config=replace(start.config, rounds=everything))

    def run_swarm(self) -> None:
        """Four volunteers, a kill, a late joiner, and the bootstrap node gone."""
        self.console.rule("2. a swarm over libp2p: one bootstrap node, four volunteers")
        rounds = self.prepared.config.rounds
        self.swarm_time = time.monotonic()
        with Live(console=self.console, refresh_per_second=2, get_renderable=self.picture):
            self._start_bootstrap()
            address = (WORK / "run" / "address").read_text().split()[-1]
            for number in range(1, 5):
                self.volunteers.append(Volunteer.start(f"peer{number}", address))
            self.note("four volunteers are joining through the bootstrap node")
            self._until(lambda: self.round >= rounds.num_rounds * 3 // 8, "the first rounds")
            self._kill(self.volunteers[1])
            self._until(lambda: self.round >= rounds.num_rounds // 2, "a round after the kill")
            self.volunteers.append(Volunteer.start("peer5", self.volunteers[0].address))
            self.note("peer5 joins late, through peer1's address")
            self._until(lambda: bool(self.volunteers[4].last("first step")), "peer5 to train")
            self._stop(self._bootstrap, "the bootstrap node")
            self.note("the bootstrap node has left; nobody needs it")
            self._until(
                lambda: all(v.last("finished") for v in self.volunteers if not v.killed), "the end"
            )
            self.note("the run is over")

    def picture(self) -> Group:
        """The table and the latest notes."""
        table = Table(expand=False)
        for heading in ("peer", "", "path", "round", "loss", "perplexity", "tok/s", "training"):
            table.add_column(heading, justify="left" if heading in ("peer", "") else "right")
        for volunteer in self.volunteers:
            last = volunteer.last("round")
            path = volunteer.last("path").get("path", "")
            cells = ["", "", "", "", ""]
            if last:
                loss = f"{last['loss']:.3f}" if last["loss"] is not None else ""
                cells = [
                    f"{last['round']}/{self.prepared.config.rounds.num_rounds}",
                    loss,
                    f"{last['perplexity']:.1f}",
                    f"{last['tokens_per_second']:,}",
                    f"{last['inner_share']:.0%}",
                ]
            table.add_row(volunteer.name, volunteer.status, path, *cells)
        elapsed = f"{time.monotonic() - self.start_time:5.0f} s"
        return Group(table, Text("\n".join([*self.notes[-6:], elapsed])))

    @property
    def round(self) -> int:
        """The latest round that any volunteer has reached."""
        return max((v.last("round").get("round", 0) for v in self.volunteers), default=0)

    @property
    def prepared(self) -> Start:
        """The run, once it is prepared."""
        assert self.start is not None, "the run is prepared first"
        return self.start

    @property
    def _bootstrap(self) -> subprocess.Popen[bytes]:
        assert self.bootstrap is not None, "the bootstrap node is started first"
        return self.bootstrap

    def _start_bootstrap(self) -> None:
        arguments = ["serve", str(WORK / "run"), "--start-in", str(START_IN_SECONDS)]
        with (WORK / "bootstrap.log").open("wb") as log:
            self.bootstrap = subprocess.Popen(
                [str(BIN / "dipaco-bootstrap"), *arguments, "--host-maddr", LOOPBACK, "-v"],
                stdout=log,
                stderr=log,
            )
        self.note("the bootstrap node is starting")
        self._until((WORK / "run" / "address").exists, "the bootstrap node's address")

    def _kill(self, victim: Volunteer) -> None:
        victim.process.kill()
        victim.process.wait()
        victim.killed = True
        self.versions_at_kill = newest_versions(self.volunteers)
        self.note(f"{victim.name} was killed with SIGKILL")

    def _until(self, condition: Any, what: str) -> None:  # noqa: ANN401
        """Wait for something; give up when the run should long be over, or a process died."""
        rounds = self.prepared.config.rounds
        slots = rounds.num_rounds + END_GRACE_SLOTS
        deadline = self.swarm_time + START_IN_SECONDS + slots * rounds.round_seconds
        while not condition():
            for volunteer in self.volunteers:
                volunteer.follow()
                if not volunteer.killed and volunteer.process.poll() is not None:
                    raise SystemExit(
                        f"{volunteer.name} ended early; see {WORK}/{volunteer.name}.log"
                    )
            if time.monotonic() > deadline:
                raise SystemExit(f"gave up waiting for {what}; see the logs in {WORK}")
            time.sleep(0.25)

    def _stop(self, process: subprocess.Popen[bytes], what: str) -> None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"{what} did not leave within 20 s of Ctrl-C") from None

    def stop_all(self) -> None:
        """Ctrl-C for everyone who is left."""
        left = [v.process for v in self.volunteers if v.process.poll() is None]
        if self.bootstrap is not None and self.bootstrap.poll() is None:
            left.append(self.bootstrap)
        for process in left:
            process.send_signal(signal.SIGINT)
        for process in left:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()

    def swarm_status(self) -> dict[str, Any]:
        """What `dipaco-peer status` says, asked through a volunteer."""
        command = [str(BIN / "dipaco-peer"), "status", self.volunteers[0].address, "--json"]
        result = subprocess.run(command, check=True, capture_output=True, timeout=90)
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def train_dense(self) -> Evaluations:
        """The baseline: as many steps as the path that was trained longest."""
        steps = max((v.last("round").get("steps", 0) for v in self.volunteers), default=1)
        self.console.rule(f"3. for comparison: a dense model of one path's size, {steps} steps")
        torch.set_num_threads(2)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        ) as progress:
            task = progress.add_task("dense", total=steps)
            dense = train_dense(self.prepared, steps, on_step=lambda step: progress.advance(task))
        return evaluate_dense(self.prepared.sharding, dense)


def main() -> int:
    """Run it all; 0 if everything that is promised held."""
    console = Console()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    demo = Demo(console)
    demo.prepare()
    try:
        demo.run_swarm()
        status = demo.swarm_status()
    finally:
        demo.stop_all()
    for volunteer in demo.volunteers:
        volunteer.follow()
    dense = demo.train_dense()
    figures = {
        **report(
            demo.prepared,
            demo.volunteers,
            status,
            dense,
            versions_at_kill=demo.versions_at_kill,
        ),
        "seconds": round(time.monotonic() - demo.start_time, 1),
        "notes": demo.notes,
    }
    (WORK / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.rule("4. what came out")
    print_report(console, figures)
    held = verdicts(figures)
    for promise, kept in held.items():
        console.print(f"{'yes' if kept else 'NO ':>4}  {promise}")
    console.print(f"{figures['seconds']:.0f} s in all; figures in {WORK / 'demo.json'}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
