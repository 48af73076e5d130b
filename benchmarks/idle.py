"""What a peer's network costs in CPU while it trains: its event loop, and its p2pd.

A run of `examples/tiny.toml`'s model with slots of `--slot-seconds` is prepared and served, and
volunteers train it, as processes of their own on loopback. From their first slot on, for
`--seconds`, the CPU time of each volunteer's main thread (the event loop; training runs in others)
and of its p2pd is taken from the system, in percent of one core.

    python -m benchmarks.idle --peers 3 --seconds 60 [--json FILE]
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from bootstrap.prepare import prepare_run
from dipaco.config import RunConfig

TINY_FILE = Path(__file__).parents[1] / "examples" / "tiny.toml"
LOOPBACK = ("--host-maddr", "/ip4/127.0.0.1/tcp/0")
START_SECONDS = 240.0  # for all processes and a first slot, on a busy machine
START_IN_SECONDS = 25.0
LEAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Cost:
    """CPU seconds so far."""

    loop: float
    threads: float  # training, reducing, reading and writing
    p2pd: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.loop - other.loop, self.threads - other.threads, self.p2pd - other.p2pd)


def cost_of(process: psutil.Process) -> Cost:
    """What a volunteer has cost so far; its main thread has the process's number."""
    seconds = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    loop = seconds.pop(process.pid)
    [p2pd] = [child for child in process.children() if child.name() == "p2pd"]
    times = p2pd.cpu_times()
    return Cost(loop, sum(seconds.values()), times.user + times.system)


def launch(stack: ExitStack, command: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of ours that ends with this one."""
    package = "bootstrap" if command == "serve" else "peer"
    program = [sys.executable, "-c", f"from {package}.cli import main; main()", command, *arguments]
    process = subprocess.Popen([*program, *LOOPBACK, "--quiet"])

    def end() -> None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


def wait_for(what: str, is_there: Callable[[], bool]) -> None:
    """Until something has happened."""
    deadline = time.monotonic() + START_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {START_SECONDS:.0f} s: {what}")
        time.sleep(0.1)


def has_trained(state_dir: Path) -> bool:
    """Whether a volunteer has contributed, so that its start-up is over."""
    return any(
        '"contributed"' in file.read_text() for file in state_dir.glob("runs/*/events.jsonl")
    )


def measure(num_peers: int, seconds: float, slot_seconds: float) -> dict[str, Any]:
    """All figures of one run."""
    config = RunConfig.from_toml(TINY_FILE.read_text())
    rounds = replace(
        config.rounds, num_rounds=1000, round_seconds=slot_seconds, blocking=False, inner_steps=50
    )
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run_dir = directory / "run"
        prepare_run(replace(config, rounds=rounds), run_dir, lambda stage, done, total: None)
        launch(stack, "serve", str(run_dir), "--start-in", str(START_IN_SECONDS))
        wait_for("the first address", (run_dir / "address").exists)
        address = (run_dir / "address").read_text().split()[-1]
        state_dirs = [directory / f"peer{number}" for number in range(num_peers)]
        peers = [
            launch(stack, "join", address, "--state-dir", str(state_dir), "--threads", "1")
            for state_dir in state_dirs
        ]
        for state_dir in state_dirs:
            wait_for("a contribution", lambda d=state_dir: has_trained(d))
        processes = [psutil.Process(peer.pid) for peer in peers]
        before = [cost_of(process) for process in processes]
        begin = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - begin
        costs = [cost_of(p) - cost for p, cost in zip(processes, before, strict=True)]
    return {
        "peers": num_peers,
        "seconds": round(elapsed, 1),
        "slot_seconds": slot_seconds,
        "loop_percent": [round(100 * cost.loop / elapsed, 2) for cost in costs],
        "p2pd_percent": [round(100 * cost.p2pd / elapsed, 2) for cost in costs],
        "threads_percent": [round(100 * cost.threads / elapsed, 2) for cost in costs],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", type=click.IntRange(1, 16), default=3, show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--slot-seconds", type=float, default=60.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(peers: int, seconds: float, slot_seconds: float, json_file: Path | None) -> None:
    """Measure what the network costs a volunteer in CPU while it trains."""
    figures = measure(peers, seconds, slot_seconds)
    table = Table(title=f"{peers} volunteers for {figures['seconds']:.0f} s, in % of a core")
    for heading in ("volunteer", "event loop", "p2pd", "training and reducing"):
        table.add_column(heading, justify="right")
    names = ("loop_percent", "p2pd_percent", "threads_percent")
    for number, line in enumerate(zip(*(figures[name] for name in names), strict=True)):
        table.add_row(str(number), *(f"{value:.2f}" for value in line))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
