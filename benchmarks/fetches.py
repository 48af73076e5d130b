"""Ten thousand fetches over connections that are cut at random: what is accepted, and what is lost.

A client fetches blobs of one to three chunks from a few servers, all real p2pds on loopback, each
behind a proxy that cuts every connection after a random number of bytes. Each server is asked for
one blob at a time, so that a cut can be told from another, and what its proxy has carried beyond
the blob's bytes was sent in vain.

    python -m benchmarks.fetches --fetches 10000 [--json FILE]
"""

import asyncio
import json
import random
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dht.errors import SwarmError
from dipaco.digest import CHUNK_BYTES
from peer.blob_server import BlobServer
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.store import BlobStore
from tests.fault_proxy import FaultProxy, Line
from tests.swarm.local import LocalPeer, start_peer

NUM_SERVERS = 8
BLOBS_PER_SERVER = 6
MAX_BLOB_CHUNKS = 3
CUT_AFTER_BYTES = (16 * 1024, 8 * CHUNK_BYTES)  # the first ones let the handshake through
FETCH_SECONDS = 60.0
MAX_ATTEMPTS = 20
CONNECTION_BYTES = 24 * 1024  # of handshake and libp2p's own messages, of each connection
OVERHEAD = 0.01  # of encryption and framing


class CountingStore(BlobStore):
    """Knows how many chunks were begun to be sent."""

    num_read = 0

    def read_chunk(self, digest: str, chunk: int) -> bytes | None:
        """See `BlobStore`."""
        self.num_read += 1
        return super().read_chunk(digest, chunk)


@dataclass
class Server:
    """One server, behind its proxy."""

    peer: LocalPeer
    proxy: FaultProxy
    store: CountingStore
    blobs: dict[str, bytes]


@dataclass
class Tally:
    """What came of all fetches."""

    fetches: int = 0
    wrong: int = 0
    attempts: int = 0
    cuts: int = 0
    chunks: int = 0
    resent_bytes: int = 0
    chunks_begun_again: int = 0
    most_resent_chunks_per_cut: float = 0.0
    over_one_chunk: int = 0  # fetches that carried more than that again per cut


async def fetch(
    client: BlobClient, store: BlobStore, server: Server, digest: str, tally: Tally
) -> None:
    """One fetch until it succeeds, and the account of it."""
    blob = server.blobs[digest]
    carried, cuts = server.proxy.forwarded_bytes["down"], server.proxy.faults["cut"]
    begun, connections = server.store.num_read, server.proxy.num_connections
    source = server.peer.peer_id
    for _ in range(MAX_ATTEMPTS):
        tally.attempts += 1
        try:
            await client.fetch(digest, [source], max_bytes=len(blob), timeout_seconds=FETCH_SECONDS)
            break
        except SwarmError:
            await asyncio.sleep(0.5)
    else:
        raise SystemExit(f"a fetch failed {MAX_ATTEMPTS} times")
    tally.fetches += 1
    tally.wrong += store.file(digest).read_bytes() != blob
    store.remove(digest)
    num_chunks = -(-len(blob) // CHUNK_BYTES)
    tally.chunks += num_chunks
    cuts = server.proxy.faults["cut"] - cuts
    connections = server.proxy.num_connections - connections
    carried = server.proxy.forwarded_bytes["down"] - carried
    resent = carried - round(len(blob) * (1 + OVERHEAD)) - CONNECTION_BYTES * connections
    tally.cuts += cuts
    if cuts:
        tally.resent_bytes += max(0, resent)
        tally.chunks_begun_again += server.store.num_read - begun - num_chunks
        per_cut = resent / CHUNK_BYTES / cuts
        tally.most_resent_chunks_per_cut = max(tally.most_resent_chunks_per_cut, per_cut)
        tally.over_one_chunk += per_cut > 1


async def serve(
    stack: AsyncExitStack, directory: Path, number: int, known: list[str], seed: int
) -> Server:
    """One more server, with blobs of its own."""
    proxy = await stack.enter_async_context(FaultProxy(seed=seed + number))
    name = f"server{number}"
    peer = await start_peer(directory, name, initial_peers=known, config=proxy.behind)
    stack.push_async_callback(peer.close)
    generator = random.Random(seed + number)
    store = CountingStore(directory / name)
    blobs = {}
    for _ in range(BLOBS_PER_SERVER):
        blob = generator.randbytes(
            generator.randint(CHUNK_BYTES // 2, MAX_BLOB_CHUNKS * CHUNK_BYTES)
        )
        blobs[store.add(blob)] = blob
    await BlobServer(store).serve(peer.transport)
    return Server(peer=peer, proxy=proxy, store=store, blobs=blobs)


async def measure(num_fetches: int, seed: int) -> dict[str, Any]:
    """All fetches, and the figures of them."""
    tally = Tally()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[Server] = []
        for number in range(NUM_SERVERS):
            known = [servers[0].peer.maddr] if servers else []
            servers.append(await serve(stack, directory, number, known, seed))
        # The client's address is a proxy's, too: nobody is to reach it past the cuts.
        proxy = await stack.enter_async_context(FaultProxy(seed=seed - 1))
        peer = await start_peer(
            directory, "client", initial_peers=[servers[0].peer.maddr], config=proxy.behind
        )
        stack.push_async_callback(peer.close)
        for server in servers:
            await peer.transport.connect(server.peer.maddr)
        events = EventLog(directory / "events", time.time)
        stack.callback(events.close)
        faults = Faults(events)
        store = BlobStore(directory / "client")
        client = BlobClient(store, peer.transport, faults)
        for server in servers:
            server.proxy.line = Line(cut_after_bytes=CUT_AFTER_BYTES)
            await server.proxy.cut()
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, server in enumerate(servers):
                share = len(range(number, num_fetches, NUM_SERVERS))
                group.create_task(
                    fetch_all(client, store, server, share, tally, random.Random(number))
                )
        seconds = time.monotonic() - begin
        await client.close()
        bad_blobs = sum(kinds["BadBlob"] for kinds in faults.by_peer.values())
    return {
        "fetches": tally.fetches,
        "attempts": tally.attempts,
        "chunks": tally.chunks,
        "cuts": tally.cuts,
        "wrong_bytes_accepted": tally.wrong,
        "wrong_bytes_refused": bad_blobs,
        "resent_chunks_per_cut": round(tally.resent_bytes / CHUNK_BYTES / max(1, tally.cuts), 3),
        "most_resent_chunks_per_cut": round(tally.most_resent_chunks_per_cut, 3),
        "fetches_over_one_chunk_per_cut": tally.over_one_chunk,
        "chunks_begun_again_per_cut": round(tally.chunks_begun_again / max(1, tally.cuts), 3),
        "seconds": round(seconds, 1),
    }


async def fetch_all(
    client: BlobClient,
    store: BlobStore,
    server: Server,
    num_fetches: int,
    tally: Tally,
    generator: random.Random,
) -> None:
    """The fetches from one server, one after another."""
    for _ in range(num_fetches):
        await fetch(client, store, server, generator.choice(list(server.blobs)), tally)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--fetches", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(fetches: int, seed: int, json_file: Path | None) -> None:
    """Fetch blobs over connections that are cut at random."""
    figures = asyncio.run(measure(fetches, seed))
    table = Table(title=f"{fetches:,} fetches")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
