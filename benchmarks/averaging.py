"""One averaging round of a path's modules, from slot end to applied version, in each wire format.

Every peer is a process of its own with its own p2pd, on loopback; each contributes a random outer
gradient for a path of `--params` parameters at the same instant, and is done when it has applied
the certified next version of every module. In the same run, as many processes average a tensor of
the same size with `hivemind.DecentralizedAverager` in float16. Seconds of processor time, of a peer
and its p2pd together, say what a round costs where each peer has cores of its own.

    python -m benchmarks.averaging --peers 2 --params 25e6 [--format int4] [--json FILE]
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import psutil
import torch
from rich.console import Console
from rich.table import Table

from dht.identity import Identity
from dipaco.checkpoint import ModuleState, encode_state
from dipaco.compression import WireFormat, encode, encoded_bytes
from dipaco.config import (
    CorpusConfig,
    DenseStartConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RoundsConfig,
    RunConfig,
    TopologyConfig,
)
from dipaco.digest import blob_digest
from dipaco.model import num_parameters
from dipaco.topology import ModuleID, PathID, Topology
from peer.config import PeerConfig
from peer.draft import Offer
from peer.keeper import Keeper
from peer.manifest import BlobRef, Manifest, ShardRef
from peer.messages import PROTOCOL_VERSION, sign
from peer.providers import Providers
from peer.session import make_node, open_network

NUM_ROUNDS = 6
ROUND_SECONDS_PER_PEER = 2.5  # all of them reduce on this machine's few cores
START_IN_SECONDS = 25.0  # for all processes to start
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def config_of(params: float, wire_format: str, peers: int) -> RunConfig:
    """A run of one path with about `params` parameters, most of them in one module."""
    width, num_blocks = 512, 8
    per_block = params / num_blocks
    ffn_width = max(8, round((per_block - 4 * width * width) / (3 * width)))
    return RunConfig(
        name="averaging",
        model=ModelConfig(
            vocab_size=512,
            width=width,
            num_blocks=num_blocks,
            num_heads=8,
            num_kv_heads=8,
            ffn_width=ffn_width,
            sequence_tokens=64,
        ),
        topology=TopologyConfig(levels=(1,)),
        corpus=CorpusConfig(source="python"),
        dense_start=DenseStartConfig(
            steps=0, learning_rate=1e-3, warmup_steps=0, batch_sequences=1
        ),
        inner=InnerConfig(batch_sequences=1, learning_rate=1e-3, warmup_steps=0),
        outer=OuterConfig(wire_format=wire_format),  # type: ignore[arg-type]
        rounds=RoundsConfig(
            num_rounds=NUM_ROUNDS,
            round_seconds=ROUND_SECONDS_PER_PEER * peers,
            inner_steps=1,
            blocking=True,
        ),
    )


def run_of(
    config: RunConfig, operator: Identity, start_time: float
) -> tuple[Manifest, list[bytes]]:
    """A manifest whose shard, tokenizer and router are placeholders, and its start states."""
    topology = Topology.of(config)
    generator = torch.Generator().manual_seed(0)
    states = [
        encode_state(ModuleState.initial(torch.randn(size, generator=generator)))
        for level in topology.levels
        if (size := num_parameters(config.model, topology, ModuleID(level.index, 0)))
    ]
    placeholder = b"not used here"
    ref = BlobRef(digest=blob_digest(placeholder), num_bytes=len(placeholder))
    manifest = Manifest(
        peer=operator.peer_id,
        protocol=PROTOCOL_VERSION,
        name=config.name,
        version=1,
        start_time=start_time,
        fingerprint=config.fingerprint(),
        config=config.to_dict(),
        tokenizer=ref,
        router=ref,
        shards=(ShardRef(path="0", blob=ref, tokens=1),),
        starts=tuple(BlobRef(digest=blob_digest(raw), num_bytes=len(raw)) for raw in states),
    )
    return sign(manifest, operator), [placeholder, *states]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one round took one peer."""

    seconds: float  # from the slot's agreed instant to the applied version
    cpu_seconds: float  # until its end, p2pd included
    received_bytes: int


async def worker(
    directory: Path, number: int, config: RunConfig, start_time: float
) -> list[dict[str, float]]:
    """One peer: contributes in every slot; returns what each cost it."""
    operator = Identity((1).to_bytes(32, "big"))
    manifest, blobs = run_of(config, operator, start_time)
    initial_peers: tuple[str, ...] = ()
    if number > 0:
        initial_peers = ((directory / "address").read_text(),)
    peer_config = PeerConfig(
        state_dir=directory / str(number), initial_peers=initial_peers, host_maddrs=LOOPBACK
    )
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network(peer_config))
        if number == 0:
            [address] = await network.swarm.maddrs()
            (directory / "address.new").write_text(address)
            (directory / "address.new").rename(directory / "address")
        run_dir = peer_config.state_dir / "run"
        run_dir.mkdir()
        node = make_node(network, manifest=manifest, run_dir=run_dir)
        stack.callback(node.events.close)
        for blob in blobs:
            node.store.add(blob)
        keeper = Keeper(node, Providers(node.swarm, node.store, node.blobs))
        path = PathID((0,))
        modules = manifest.topology.modules_of(path)
        keeper.presence.path = path
        keeper.own(modules, path)
        await stack.enter_async_context(keeper.running())
        await keeper.hold(modules)
        return [asdict(await one_round(keeper, slot, number)) for slot in range(NUM_ROUNDS)]


def cpu_seconds() -> float:
    """Of this process and p2pd, so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


async def one_round(keeper: Keeper, slot: int, number: int) -> Cost:
    """A slot, from an agreed instant on, with the outer gradient in memory already."""
    node = keeper.node
    outer = node.manifest.run_config.outer
    limit = node.manifest.run_config.rounds.round_seconds
    generator = torch.Generator().manual_seed(1000 * slot + number)
    modules = sorted(node.log.held)
    gradients = {
        module: torch.randn(node.log.num_parameters(module), generator=generator).mul_(1e-3)
        for module in modules
    }
    begin = node.manifest.slot_start(slot) + 1.0  # so that making the random numbers is over
    await asyncio.sleep(begin - node.now())
    cpu_before, received_before = cpu_seconds(), node.transport.traffic.received_bytes
    offers = []
    for module in modules:
        held = node.log.held[module]
        gradient = gradients[module]
        raw = await node.offload(partial(encode, gradient, outer.wire_format))
        offers.append(
            Offer(
                module=module,
                base_version=held.version,
                base_state=held.state,
                tokens=1,
                raw=raw,
            )
        )
    commitments = await keeper.committer.prepare(offers, path=PathID((0,)), slot=slot)
    keeper.background.start(keeper.committer.commit(commitments), "commit")
    applied = await keeper.versions.until(
        lambda: all(node.log.held[module].version > slot for module in modules), limit
    )
    if not applied:
        raise SystemExit(f"a round took more than {limit:.0f} s; the machine is too busy for this")
    seconds = node.now() - begin
    # The slowest peer still needs the others' bytes, and states are still being written.
    await asyncio.sleep(max(0.0, node.manifest.slot_start(slot + 1) - 0.5 - node.now()))
    return Cost(
        seconds=seconds,
        cpu_seconds=cpu_seconds() - cpu_before,
        received_bytes=node.transport.traffic.received_bytes - received_before,
    )


def hivemind_worker(
    number: int, peers: int, params: int, directory: Path
) -> list[dict[str, float]]:
    """One process of hivemind's averager: seconds to form the group, and to all-reduce."""
    import hivemind
    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import Float16Compression

    initial = [(directory / "hivemind").read_text()] if number > 0 else None
    dht = hivemind.DHT(initial_peers=initial, start=True)
    if number == 0:
        (directory / "hivemind.new").write_text(str(dht.get_visible_maddrs()[0]))
        (directory / "hivemind.new").rename(directory / "hivemind")
    averager = DecentralizedAverager(
        [torch.randn(params)],
        dht=dht,
        prefix="benchmark",
        target_group_size=peers,
        min_matchmaking_time=5.0,
        request_timeout=3.0,
        compression=Float16Compression(),
        allreduce_timeout=60.0,
        start=True,
    )
    (directory / f"hivemind-{number}").touch()
    wait_for([directory / f"hivemind-{n}" for n in range(peers)])
    rounds = []
    for number_of_round in range(NUM_ROUNDS):
        begin, cpu_before = time.monotonic(), cpu_seconds()
        control = averager.step(wait=False, timeout=60)
        while not control.began_allreduce and not control.done():
            time.sleep(0.01)
        formed = time.monotonic()
        control.result(timeout=90)
        reduce_seconds = time.monotonic() - formed
        (directory / f"hivemind-{number}-{number_of_round}").touch()
        wait_for([directory / f"hivemind-{n}-{number_of_round}" for n in range(peers)])
        rounds.append(
            {
                "group_seconds": formed - begin,
                "reduce_seconds": reduce_seconds,
                "seconds": formed - begin + reduce_seconds,
                "cpu_seconds": cpu_seconds() - cpu_before,
            }
        )
    averager.shutdown()
    dht.shutdown()
    return rounds


def wait_for(files: list[Path], seconds: float = 90.0) -> None:
    """Until all files are there."""
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        if time.monotonic() > deadline:
            raise SystemExit("the other processes did not start")
        time.sleep(0.02)


def launch(peers: int, arguments: list[str], directory: Path, first_file: str) -> list[Any]:
    """Run one worker process per peer and collect what they print."""
    command = [sys.executable, "-m", "benchmarks.averaging", "--directory", str(directory)]
    processes = []
    for number in range(peers):
        if number == 1:
            wait_for([directory / first_file])
        processes.append(
            subprocess.Popen(
                [*command, "--worker", str(number), *arguments], stdout=subprocess.PIPE
            )
        )
    return [json.loads(process.communicate(timeout=400)[0]) for process in processes]


def of_slowest(per_peer: list[list[dict[str, float]]], name: str) -> float:
    """A round is over when its slowest peer is; the first one, which warms up, is left out."""
    rounds = [max(costs[name] for costs in of_round) for of_round in zip(*per_peer, strict=True)]
    return statistics.median(rounds[1:])


def measure(peers: int, params: int, formats: Sequence[str]) -> dict[str, Any]:
    """All figures of one run."""
    figures: dict[str, Any] = {"peers": peers, "params": params, "rounds": NUM_ROUNDS - 1}
    common = ["--peers", str(peers), "--params", str(params)]
    with tempfile.TemporaryDirectory() as directory:
        results = launch(peers, [*common, "--format", "hivemind"], Path(directory), "hivemind")
    names = ("seconds", "group_seconds", "reduce_seconds", "cpu_seconds")
    figures["hivemind"] = {name: round(of_slowest(results, name), 2) for name in names}
    for wire_format in formats:
        with tempfile.TemporaryDirectory() as directory:
            arguments = [*common, "--format", wire_format]
            arguments += ["--start-time", str(time.time() + START_IN_SECONDS)]
            results = launch(peers, arguments, Path(directory), "address")
        config = config_of(params, wire_format, peers)
        num_parameters = path_parameters(config)
        bound = (peers - 1) * encoded_bytes(config.outer.wire_format, num_parameters)
        received = of_slowest(results, "received_bytes")
        seconds = of_slowest(results, "seconds")
        figures[wire_format] = {
            "seconds": round(seconds, 2),
            "ratio_to_hivemind": round(figures["hivemind"]["seconds"] / seconds, 2),
            "cpu_seconds": round(of_slowest(results, "cpu_seconds"), 2),
            "received_bytes_per_parameter": round(received / num_parameters, 4),
            "over_bound": round(received / bound - 1, 4),
        }
    figures["default_format"] = OuterConfig().wire_format
    return figures


def path_parameters(config: RunConfig) -> int:
    """Of the one path."""
    topology = Topology.of(config)
    modules = topology.modules_of(topology.path_at(0))
    return sum(num_parameters(config.model, topology, module) for module in modules)


def table_of(figures: dict[str, Any]) -> Table:
    """The figures side by side."""
    table = Table(title=f"{figures['peers']} peers, {figures['params'] / 1e6:g} M parameters")
    table.add_column("one round")
    for heading in ("seconds", "times as fast", "processor s", "bytes/parameter", "over bound"):
        table.add_column(heading, justify="right")
    hivemind = figures["hivemind"]
    group = f"hivemind, float16 ({hivemind['group_seconds']:.2f} s to form the group)"
    table.add_row(
        group, f"{hivemind['seconds']:.2f}", "1", f"{hivemind['cpu_seconds']:.2f}", "", ""
    )
    for name in get_args(WireFormat):
        if name in figures:
            figure = figures[name]
            table.add_row(
                f"ours, {name}" + (" (default)" if name == figures["default_format"] else ""),
                f"{figure['seconds']:.2f}",
                f"{figure['ratio_to_hivemind']:.2f}",
                f"{figure['cpu_seconds']:.2f}",
                f"{figure['received_bytes_per_parameter']:.3f}",
                f"{figure['over_bound']:+.1%}",
            )
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--peers", type=click.IntRange(2, 16), default=2, show_default=True)
@click.option("--params", type=float, default=25e6, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--worker", "number", type=int, hidden=True)
@click.option("--directory", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="Wire formats, instead of all.  [float32|float16|int8|int4|topk]",
)
@click.option("--start-time", type=float, hidden=True, default=0.0)
def main(  # noqa: PLR0913 - one parameter per option
    peers: int,
    params: float,
    json_file: Path | None,
    number: int | None,
    directory: Path | None,
    formats: tuple[str, ...],
    start_time: float,
) -> None:
    """Time one averaging round beside hivemind's averager."""
    if number is not None and directory is not None:
        torch.set_num_threads(1)
        if formats == ("hivemind",):
            result = hivemind_worker(number, peers, int(params), directory)
        else:
            config = config_of(params, formats[0], peers)
            result = asyncio.run(worker(directory, number, config, start_time))
        print(json.dumps(result))
        return
    figures = measure(peers, int(params), formats or get_args(WireFormat))
    Console().print(table_of(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
