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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dipaco.checkpoint import decode_state
from dipaco.inner import PathTrainer
from dipaco.model import num_parameters
from dipaco.reference import evaluate_dense, total, train_dense
from dipaco.rounds import Evaluations
from dipaco.start import Start
from dipaco.topology import ModuleID
from peer.store import BlobStore
from tests.history_checker import check, read_histories

EXAMPLES = Path(__file__).parent
WORK = Path("demo-run")
BIN = Path(sys.executable).parent
START_IN_SECONDS = 22  # for four volunteers to start on two cores
END_GRACE_SLOTS = 5  # beyond the last round, for rounds that a kill delayed
SHARED_BY_ALL = "0.0"  # the embedding: whoever contributes to a round contributes to it
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass
class Volunteer:
    """One `dipaco-peer join` process, followed through its event log."""

    name: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    killed: bool = False
    launch_time: float = field(default_factory=time.time)
    _offset: int = 0

    @classmethod
    def start(cls, name: str, address: str) -> "Volunteer":
        """Start it, on one thread, in a state directory of its own."""
        state_dir = WORK / name
        state_dir.mkdir(parents=True)
        arguments = ["join", address, "--state-dir", str(state_dir), "--threads", "1"]
        with (WORK / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / "dipaco-peer"), *arguments, "--host-maddr", LOOPBACK, "-v"],
                stdout=log,
                stderr=log,
            )
        return cls(name, state_dir, process)

    def follow(self) -> None:
        """Read what it has logged since the last time."""
        for file in self.state_dir.glob("runs/*/events.jsonl"):
            with file.open() as stream:
                stream.seek(self._offset)
                while (line := stream.readline()).endswith("\n"):
                    self._offset = stream.tell()
                    self.events.append(json.loads(line))

    def last(self, event: str) -> dict[str, Any]:
        """Its latest event of a kind; empty if there is none."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    @property
    def address(self) -> str:
        """Where others can join through it."""
        return (self.state_dir / "address").read_text().split()[-1]

    @property
    def peer_id(self) -> str:
        """Its libp2p ID."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def status(self) -> str:
        """One word for the table."""
        if self.killed:
            return "killed"
        if self.process.poll() is not None:
            return "left"
        if self.last("finished"):
            return "finished"
        return "training" if self.last("first step") else "joining"


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
        rounds = self._start.config.rounds
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
                    f"{last['round']}/{self._start.config.rounds.num_rounds}",
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
    def _start(self) -> Start:
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
        rounds = self._start.config.rounds
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

    def evaluate(self, digests: dict[str, str]) -> tuple[Evaluations, Evaluations]:
        """Every path at the start and at the end, on the validation part of its shard."""
        start = self._start
        at_start, at_end = {}, {}
        for path in start.topology.paths:
            trainer = PathTrainer(start.config, start.topology, path, start.shard(path))
            for module in trainer.modules:
                trainer.write_module(module, start.module_state(module).parameters)
            at_start[path] = trainer.evaluate(start.config.rounds.eval_sequences)
            for module in trainer.modules:
                trainer.write_module(module, self._final_parameters(module, digests[str(module)]))
            at_end[path] = trainer.evaluate(start.config.rounds.eval_sequences)
        return at_start, at_end

    def _final_parameters(self, module: ModuleID, digest: str) -> torch.Tensor:
        """A module's final state from whichever volunteer holds it, checked by its digest."""
        start = self._start
        size = num_parameters(start.config.model, start.topology, module)
        for blobs in WORK.glob("peer*/runs/*/blobs"):
            raw = BlobStore(blobs).read(digest)
            if raw is not None:
                return decode_state(raw, num_parameters=size).parameters
        raise SystemExit(f"no volunteer has module {module} with digest {digest[:12]}")

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
            dense = train_dense(self._start, steps, on_step=lambda step: progress.advance(task))
        return evaluate_dense(self._start.sharding, dense)


def newest_versions(volunteers: list[Volunteer]) -> dict[str, int]:
    """The newest version of every module that any volunteer has applied."""
    versions: dict[str, int] = {}
    for volunteer in volunteers:
        for entry in volunteer.events:
            if entry["event"] in ("version", "caught up"):
                module = entry["module"]
                versions[module] = max(versions.get(module, 0), entry["version"])
    return versions


def digests_by_version(volunteers: list[Volunteer]) -> dict[tuple[str, int], set[str]]:
    """Every state that any volunteer ever applied, by module and version."""
    states: dict[tuple[str, int], set[str]] = {}
    for volunteer in volunteers:
        for entry in volunteer.events:
            if entry["event"] in ("version", "caught up"):
                states.setdefault((entry["module"], entry["version"]), set()).add(entry["state"])
    return states


def report(demo: Demo, status: dict[str, Any], dense: Evaluations) -> dict[str, Any]:
    """Everything the tables show, as `demo.json`."""
    digests = {module["module"]: module["state"] for module in status["modules"]}
    at_start, at_end = demo.evaluate(digests)
    versions = newest_versions(demo.volunteers)
    return {
        "seconds": round(time.monotonic() - demo.start_time, 1),
        "perplexity": {
            "start": total(at_start).perplexity,
            "end": total(at_end).perplexity,
            "dense": total(dense).perplexity,
        },
        "paths": {
            str(path): {
                "start": at_start[path].perplexity,
                "end": at_end[path].perplexity,
                "dense": dense[path].perplexity,
            }
            for path in at_start
        },
        "peers": [peer_figures(volunteer) for volunteer in demo.volunteers],
        "modules": [
            {**module, "version_at_kill": demo.versions_at_kill.get(module["module"], 0)}
            for module in status["modules"]
        ],
        "digests_agree": all(len(s) == 1 for s in digests_by_version(demo.volunteers).values())
        and all(module["agreed"] for module in status["modules"]),
        "history": history_figures(WORK),
        "advanced_after_kill": all(
            version > demo.versions_at_kill.get(module, 0) for module, version in versions.items()
        ),
        "notes": demo.notes,
    }


def history_figures(directory: Path) -> dict[str, Any]:
    """What all event logs together show: certificates and votes, and what is wrong with them."""
    [histories] = read_histories(directory).values()
    verdict = check(histories)
    return {
        "certificates": verdict.num_certificates,
        "votes": verdict.num_votes,
        "violations": list(verdict.violations),
    }


def peer_figures(volunteer: Volunteer) -> dict[str, Any]:
    """What one volunteer did and what it cost."""
    last = volunteer.last("contributed")
    counted = {
        entry["version"]
        for entry in volunteer.events
        if entry["event"] == "version"
        and entry["module"] == SHARED_BY_ALL
        and volunteer.peer_id in entry["contributors"]
    }
    # Its first path: it may have moved to another one later.
    ready = next((e for e in volunteer.events if e["event"] == "path"), {})
    first = volunteer.last("first step")
    return {
        "peer": volunteer.name,
        "status": volunteer.status,
        "rounds_committed": len(counted),
        "steps": last.get("steps", 0),
        "tokens": last.get("tokens", 0),
        "sent_bytes": last.get("sent_bytes", 0),
        "received_bytes": last.get("received_bytes", 0),
        "inner_share": last.get("inner_share", 0.0),
        "ready_seconds": round(ready["time"] - volunteer.launch_time, 1) if ready else None,
        "first_step_seconds": round(first["time"] - volunteer.launch_time, 1) if first else None,
    }


def print_report(console: Console, figures: dict[str, Any]) -> None:
    """The three tables, and one line of verdict each."""
    table = Table(title="validation perplexity (lower is better)")
    for heading in ("path", "start", "end", "dense"):
        table.add_column(heading, justify="right")
    for path, row in [*figures["paths"].items(), ("whole model", figures["perplexity"])]:
        table.add_row(path, *(f"{row[key]:.2f}" for key in ("start", "end", "dense")))
    console.print(table)
    peers = Table(title="peers")
    for heading in ("peer", "", "rounds", "steps", "tokens", "sent", "received", "training"):
        peers.add_column(heading, justify="left" if heading in ("peer", "") else "right")
    for peer in figures["peers"]:
        peers.add_row(
            peer["peer"],
            peer["status"],
            str(peer["rounds_committed"]),
            str(peer["steps"]),
            f"{peer['tokens']:,}",
            f"{peer['sent_bytes'] / 2**20:.1f} MiB",
            f"{peer['received_bytes'] / 2**20:.1f} MiB",
            f"{peer['inner_share']:.1%}",
        )
    console.print(peers)
    modules = Table(title="modules: the digest that all holders agree on")
    for heading in ("module", "version", "at the kill", "holders", "digest"):
        modules.add_column(heading, justify="right")
    for module in figures["modules"]:
        modules.add_row(
            module["module"],
            str(module["version"]),
            str(module["version_at_kill"]),
            str(module["holders"]),
            module["state"][:24] if module["agreed"] else "NO AGREEMENT",
        )
    console.print(modules)


def verdicts(figures: dict[str, Any]) -> dict[str, bool]:
    """What the demonstration promises, and whether it held."""
    perplexity = figures["perplexity"]
    return {
        "all holders agree on every version of every module": figures["digests_agree"],
        "the peers' event logs show a sound history": not figures["history"]["violations"],
        "every module advanced after the kill": figures["advanced_after_kill"],
        "the whole model beats its start": perplexity["end"] < perplexity["start"],
        "the whole model beats the dense model": perplexity["end"] < perplexity["dense"],
    }


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
    figures = report(demo, status, demo.train_dense())
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
