"""What slow links cost in training: a 2x2 swarm of four volunteers, each behind its own link.

Real `dipaco-peer join` processes in network namespaces, with 4-bit outer gradients and paths of
about `--params` parameters. Of each peer: the share of wall time that it spent in inner steps, over
the slots after the first, what took the rest, and what its link carried per slot; of the swarm: how
many contributions the versions count, of those that were committed. The start states are put where
the volunteers look for them, as if they had come before. Needs root and a kernel with namespaces
and tbf.

    python -m benchmarks.links --mbps 20 --slots 4 [--params 25e6] [--json FILE]
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bootstrap.node import load_blobs
from bootstrap.prepare import prepare_run
from dipaco.config import (
    CorpusConfig,
    DenseStartConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RoundsConfig,
    RoutingConfig,
    RunConfig,
    TopologyConfig,
)
from peer.store import BlobStore
from tests.swarm.namespaces import Host, Internet, why_not_permitted

NUM_PEERS = 4
START_IN_SECONDS = 75  # for five processes to start and take their paths
COMMAND_SECONDS = 60
WAIT_SECONDS = 300  # beyond the slots themselves, before the benchmark gives up


def config_of(params: float, slots: int, slot_seconds: float) -> RunConfig:
    """Two levels of two modules; a path has about `params` parameters."""
    width, num_blocks, vocab_size = 512, 8, 2048
    per_block = (params - 2 * vocab_size * width) / num_blocks
    ffn_width = max(8, round((per_block - 3 * width * width) / (3 * width)))
    return RunConfig(
        name="links",
        model=ModelConfig(
            vocab_size=vocab_size,
            width=width,
            num_blocks=num_blocks,
            num_heads=8,
            num_kv_heads=4,
            ffn_width=ffn_width,
            sequence_tokens=64,
        ),
        topology=TopologyConfig(levels=(2, 2)),
        corpus=CorpusConfig(source="python", max_documents=300, valid_fraction=0.1),
        dense_start=DenseStartConfig(
            steps=0, learning_rate=1e-3, warmup_steps=0, batch_sequences=1
        ),
        routing=RoutingConfig(method="hash"),  # asks nothing of a model this large
        inner=InnerConfig(batch_sequences=1, learning_rate=1e-4, warmup_steps=5),
        outer=OuterConfig(wire_format="int4"),
        rounds=RoundsConfig(
            num_rounds=slots,
            round_seconds=slot_seconds,
            inner_steps=100,
            num_keepers=1,
            eval_sequences=8,
        ),
    )


@dataclass
class Peer:
    """One process on one host, and what it has logged."""

    state_dir: Path
    host: Host
    process: subprocess.Popen[bytes]

    def events(self, name: str) -> list[dict[str, Any]]:
        """All entries of one kind so far."""
        lines = [
            line
            for file in self.state_dir.glob("runs/*/events.jsonl")
            for line in file.read_text().splitlines(keepends=True)
        ]
        entries = (json.loads(line) for line in lines if line.endswith("\n"))
        return [entry for entry in entries if entry["event"] == name]


def start(
    stack: ExitStack, host: Host, state_dir: Path, command: str, arguments: list[str]
) -> Peer:
    """Run a command of ours on a host; it is interrupted at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with state_dir.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*host.launcher, str(Path(sys.executable).parent / command), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    stack.callback(stop, process)
    return Peer(state_dir, host, process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, and if that does not help, at once."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(condition: Any, seconds: float, what: str) -> None:  # noqa: ANN401
    """Until it holds; ends the benchmark if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)


def measure(params: float, mbps: float, slots: int, slot_seconds: float) -> dict[str, Any]:
    """One swarm, from its start to the end of its last slot."""
    config = config_of(params, slots, slot_seconds)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start_dir = directory / "run"
        begun = prepare_run(config, start_dir, lambda stage, done, total: None)
        internet = stack.enter_context(Internet())
        hosts = [internet.host(), *(internet.host(mbps=mbps) for _ in range(NUM_PEERS))]
        serve = ["serve", str(start_dir), "--start-in", str(START_IN_SECONDS)]
        address_file = start_dir / "address"
        bootstrap = start(
            stack, hosts[0], start_dir, "dipaco-bootstrap", [*serve, *listening(hosts[0])]
        )
        wait_for(address_file.exists, COMMAND_SECONDS, "the address of the bootstrap node")
        address = address_file.read_text().split()[-1]
        [run_dir] = (bootstrap.state_dir / "runs").iterdir()
        peers = []
        for number, host in enumerate(hosts[1:]):
            state_dir = directory / f"peer{number}"
            store = BlobStore(state_dir / "runs" / run_dir.name / "blobs")
            load_blobs(store, begun, start_dir)
            join = ["join", address, "--state-dir", str(state_dir), "--device", "cpu"]
            join += ["--threads", "1", *listening(host)]
            peers.append(start(stack, host, state_dir, "dipaco-peer", join))
        patience = START_IN_SECONDS + (slots + 1) * slot_seconds + WAIT_SECONDS
        wait_for(lambda: all(len(p.events("contributed")) >= 1 for p in peers), patience, "slot 0")
        before = [peer.host.traffic_bytes for peer in peers]
        begin = time.monotonic()
        wait_for(
            lambda: all(len(p.events("contributed")) >= slots for p in peers),
            patience,
            "the last slot",
        )
        seconds = time.monotonic() - begin
        after = [peer.host.traffic_bytes for peer in peers]
        wait_for(lambda: all(p.events("finished") for p in peers), WAIT_SECONDS, "the last version")
        return {
            "params": params,
            "mbps": mbps,
            "slots": slots,
            "slot_seconds": slot_seconds,
            "peers": [
                {
                    "inner_share": round(shares["inner steps"], 4),
                    "other_shares": {
                        what: round(share, 4)
                        for what, share in shares.items()
                        if what != "inner steps"
                    },
                    "received_mb_per_slot": per_slot(a[0] - b[0], seconds, slot_seconds),
                    "sent_mb_per_slot": per_slot(a[1] - b[1], seconds, slot_seconds),
                }
                for shares, b, a in zip(map(shares_of, peers), before, after, strict=True)
            ],
            "counted_of_committed": round(counted_share(peers), 4),
            "seconds_to_version": [round(seconds, 1) for seconds in version_seconds(peers)],
        }


def listening(host: Host) -> list[str]:
    """Options by which a peer listens on its own host."""
    return ["--host-maddr", f"/ip4/{host.address}/tcp/0"]


def shares_of(peer: Peer) -> dict[str, float]:
    """What a peer's time for training went into, from the first contribution to the last one."""
    first, *_, last = peer.events("contributed")
    elapsed = last["time"] - first["time"]
    shares = {
        what: (seconds - first["seconds"].get(what, 0.0)) / elapsed
        for what, seconds in last["seconds"].items()
    }
    return {**shares, "waiting": 1.0 - sum(shares.values())}


def per_slot(num_bytes: int, seconds: float, slot_seconds: float) -> float:
    """Megabytes."""
    return round(num_bytes / 1e6 * slot_seconds / seconds, 1)


def counted_share(peers: list[Peer]) -> float:
    """Contributions in certificates over commitments, both per module and slot."""
    committed = {
        (e["module"], e["slot"], number)
        for number, peer in enumerate(peers)
        for e in peer.events("committed")
    }
    counted = {
        (e["module"], e["version"], name)
        for peer in peers
        for e in peer.events("version")
        for name in e["contributors"]
    }
    return len(counted) / len(committed)


def version_seconds(peers: list[Peer]) -> list[float]:
    """From the end of a slot to its version, for every module of a peer's path, sorted."""
    seconds = []
    for peer in peers:
        ends = {e["slot"]: e["time"] for e in peer.events("contributed")}
        trained = {e["module"] for e in peer.events("committed")}
        seconds += [
            e["time"] - ends[e["trained_slot"]]
            for e in peer.events("version")
            if e["module"] in trained and e["trained_slot"] in ends
        ]
    return sorted(seconds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--params", type=float, default=25e6, show_default=True, help="Of a path.")
@click.option("--mbps", type=float, multiple=True, default=(20.0,), show_default=True)
@click.option("--slots", type=click.IntRange(2), default=4, show_default=True)
@click.option("--slot-seconds", type=float, default=60.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    params: float,
    mbps: tuple[float, ...],
    slots: int,
    slot_seconds: float,
    json_file: Path | None,
) -> None:
    """Measure the share of wall time in inner steps behind links of each rate."""
    if reason := why_not_permitted():
        raise SystemExit(reason)
    figures = [measure(params, rate, slots, slot_seconds) for rate in mbps]
    table = Table(title=f"{params / 1e6:g} M parameters, slots of {slot_seconds:g} s, int4")
    for heading in ("Mbit/s", "in inner steps", "MB in", "MB out", "counted", "version after"):
        table.add_column(heading, justify="right")
    for line in figures:
        peers = line["peers"]
        table.add_row(
            f"{line['mbps']:g}",
            f"{min(peer['inner_share'] for peer in peers):.1%}",
            f"{max(peer['received_mb_per_slot'] for peer in peers):.1f}",
            f"{max(peer['sent_mb_per_slot'] for peer in peers):.1f}",
            f"{line['counted_of_committed']:.0%}",
            f"{statistics.median(line['seconds_to_version']):.0f} s",
        )
    Console().print(table)
    for line in figures:
        slowest = min(line["peers"], key=lambda peer: peer["inner_share"])
        others = (f"{what} {share:.1%}" for what, share in slowest["other_shares"].items())
        Console().print(f"{line['mbps']:g} Mbit/s, not in inner steps: {', '.join(others)}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
