"""How long a newcomer takes to pull a path's state, against its bytes divided by the bandwidth.

Every peer has its own p2pd in its own network namespace behind a link of `--mbps`, the newcomer
also behind one five times as fast. The bound is the narrower of the newcomer's link and all its
sources' links together. The state is a blob per module, all pulled at once, as in joining. All
newcomers, each with sources of its own, pull at the same time: what they share is the machine.
Needs root and a kernel with namespaces and tbf.

    python -m benchmarks.joining --params 25e6 [--json FILE]
"""

import asyncio
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dht.daemon import DaemonConfig
from dipaco.checkpoint import state_bytes
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.store import BlobStore
from tests.swarm.local import LocalPeer, start_peer
from tests.swarm.namespaces import Host, Internet, why_not_permitted

NUM_SOURCES = (1, 2, 4)
NUM_MODULES = 3  # of a path; each is a blob
FASTER = 5  # times, the newcomer's other link
SLACK = 5.0  # times the bound, before a measurement is given up


async def start(
    stack: AsyncExitStack, directory: Path, name: str, host: Host, known: list[str]
) -> LocalPeer:
    """A peer on `host`."""
    config = DaemonConfig(host_maddrs=(f"/ip4/{host.address}/tcp/0",), launcher=host.launcher)
    peer = await start_peer(directory, name, initial_peers=known, config=config)
    stack.push_async_callback(peer.close)
    return peer


async def pull(
    directory: Path,
    blobs: list[Path],
    ready: asyncio.Barrier,
    *,
    num_sources: int,
    mbps: float,
    joiner_mbps: float,
) -> dict[str, Any]:
    """One newcomer's pull of all blobs, once all newcomers are ready."""
    sizes = [blob.stat().st_size for blob in blobs]
    bound = sum(sizes) * 8 / 1e6 / min(joiner_mbps, num_sources * mbps)
    async with AsyncExitStack() as stack:
        internet = stack.enter_context(Internet())
        sources: list[LocalPeer] = []
        for number in range(num_sources):
            known = [sources[0].maddr] if sources else []
            host = internet.host(mbps=mbps)
            source = await start(stack, directory, f"source{number}", host, known)
            sources.append(source)
            store = BlobStore(directory / f"source{number}")
            digests = [store.add_file(blob) for blob in blobs]
            await BlobServer(store).serve(source.transport)
        host = internet.host(mbps=joiner_mbps)
        joiner = await start(stack, directory, "joiner", host, [sources[0].maddr])
        events = EventLog(directory / "events", time.time)
        stack.callback(events.close)
        store = BlobStore(directory / "joiner")
        faults = Faults(events)
        client = BlobClient(store, joiner.transport, faults)
        names = [source.peer_id for source in sources]
        await ready.wait()
        received_bytes, _ = host.traffic_bytes
        begin = time.monotonic()
        async with asyncio.timeout(60 + SLACK * bound):
            await asyncio.gather(
                *(
                    client.fetch(digest, names, max_bytes=size)
                    for digest, size in zip(digests, sizes, strict=True)
                )
            )
        seconds = time.monotonic() - begin
        received_bytes = host.traffic_bytes[0] - received_bytes
        await client.close()
    return {
        "sources": num_sources,
        "source_mbps": mbps,
        "joiner_mbps": joiner_mbps,
        "seconds": round(seconds, 2),
        "bound_seconds": round(bound, 2),
        "over_bound": round(seconds / bound - 1, 3),
        "received_over_state": round(received_bytes / sum(sizes) - 1, 3),
        "faults": faults.total,
    }


async def measure(params: int, mbps: float) -> dict[str, Any]:
    """All pulls, at the same time."""
    cases = [(n, joiner_mbps) for joiner_mbps in (mbps, FASTER * mbps) for n in NUM_SOURCES]
    ready = asyncio.Barrier(len(cases))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        blobs = [directory / f"blob{number}" for number in range(NUM_MODULES)]
        for blob in blobs:
            blob.write_bytes(os.urandom(state_bytes(params // NUM_MODULES)))
        pulls = [
            pull(
                Path(tempfile.mkdtemp(dir=directory)),
                blobs,
                ready,
                num_sources=num_sources,
                mbps=mbps,
                joiner_mbps=joiner_mbps,
            )
            for num_sources, joiner_mbps in cases
        ]
        figures = await asyncio.gather(*pulls)
        num_bytes = sum(blob.stat().st_size for blob in blobs)
    return {"params": params, "state_bytes": num_bytes, "pulls": figures}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--params", type=float, default=25e6, show_default=True, help="Of the path.")
@click.option("--mbps", type=float, default=20.0, show_default=True, help="Of each link.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(params: float, mbps: float, json_file: Path | None) -> None:
    """Time a newcomer's pull of a path's state from 1, 2 and 4 sources."""
    if reason := why_not_permitted():
        raise SystemExit(reason)
    figures = asyncio.run(measure(int(params), mbps))
    megabytes = figures["state_bytes"] / 1e6
    table = Table(title=f"{params / 1e6:g} M parameters, a state of {megabytes:.0f} MB")
    for heading in ("sources", "joiner Mbit/s", "seconds", "bound", "over the bound"):
        table.add_column(heading, justify="right")
    for line in figures["pulls"]:
        table.add_row(
            str(line["sources"]),
            f"{line['joiner_mbps']:g}",
            f"{line['seconds']:.1f}",
            f"{line['bound_seconds']:.1f}",
            f"{line['over_bound']:+.1%}",
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
