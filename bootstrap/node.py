"""The first peer of a run: a stable identity, the first address, the first seeder.

It keeps every module and takes part in their rounds as a keeper, and makes the run's next
manifests. The run does not need it: once volunteers hold everything, it may go (promise P7).
"""

import asyncio
import time
from pathlib import Path

from bootstrap.corpus import PreparedCorpus
from bootstrap.operator import Operator
from bootstrap.prepare import (
    IDENTITY_FILE,
    ROUTER_DATA_FILE,
    START_DIR,
    describe,
    served_manifest,
    sign_manifest,
)
from dht.addresses import is_global, outside
from dht.errors import LocalFault
from dipaco.errors import ConfigError
from dipaco.start import Start
from peer.address_book import AddressBook
from peer.config import PeerConfig
from peer.display import Display
from peer.join import reachable_addresses, stop_on_signals, write_address_file
from peer.keeper import Keeper
from peer.manifest import Manifest
from peer.providers import Providers
from peer.session import Network, address_book, make_node, open_network, run_directory
from peer.store import BlobStore


async def serve(config: PeerConfig, display: Display, *, start_in: float | None) -> None:
    """Serve the run that is prepared in the state directory, until interrupted.

    The first time, slot 0 begins `start_in` seconds from now, at once if that is None.
    """
    directory = config.state_dir
    try:
        start = Start.load(directory / START_DIR)
    except ConfigError as error:
        raise LocalFault(
            f"`{directory}` holds no prepared run",
            hint=f"prepare one: `dipaco-bootstrap prepare CONFIG {directory}`",
        ) from error
    served = served_manifest(directory)
    book = _address_book(directory, served) if served is not None else None
    async with open_network(config, known_maddrs=lambda: book.maddrs if book else ()) as network:
        # Signed only now: no other process serves this directory, and the node can be reached.
        manifest = served or await _sign_first(network, start, directory, start_in or 0.0)
        if served is not None and start_in is not None:
            display.say("run", "`--start-in` has no effect: slot 0 was set when first served")
        book = book or _address_book(directory, manifest)
        run_dir = run_directory(directory, manifest.digest)
        node = make_node(network, manifest=manifest, run_dir=run_dir)
        display.say("run", f"{manifest.name} ({node.run[:12]})")
        if warning := warning_of(directory / IDENTITY_FILE):
            display.say("identity", warning)
        await asyncio.to_thread(lambda: load_blobs(node.store, start, directory))
        keeper = Keeper(node, Providers(node.swarm, node.store, node.blobs), keep_all=True)
        keeper.survey.on_addresses = book.note
        operator = Operator(
            keeper,
            PreparedCorpus(start, directory, node.store),
            identity=network.identity,
            directory=directory,
        )
        stopped = asyncio.Event()
        stop_on_signals(stopped.set, display)
        node.events.listen(display.show)
        async with keeper.running():
            keeper.background.start(operator.run(), "operator")
            addresses = await reachable_addresses(network)
            write_address_file(directory, addresses)
            wait = manifest.start_time - node.now()
            if wait > 0:
                display.say("run", f"slot 0 begins in {wait:.0f} s")
            for address in outside(addresses):
                display.say("join", f"dipaco-peer join {address}")
            if advice := advice_on(addresses):
                display.say("network", advice)
            await stopped.wait()
        node.events.close()
    display.say("network", "left the swarm")


async def _sign_first(network: Network, start: Start, directory: Path, start_in: float) -> Manifest:
    """The manifest of a run that is served for the first time."""
    operator = network.identity.peer_id
    # All shards are read, which takes long; Ctrl-C meanwhile leaves nothing signed.
    described = await asyncio.to_thread(describe, start, directory, operator=operator)
    return sign_manifest(described, directory, network.identity, start_time=time.time() + start_in)


def _address_book(directory: Path, manifest: Manifest) -> AddressBook:
    return address_book(run_directory(directory, manifest.digest), manifest.digest)


def advice_on(addresses: list[str]) -> str:
    """What to do so that strangers can use these addresses; empty if they can use all of them."""
    offered = outside(addresses)
    num_global = sum(is_global(address) for address in offered)
    if num_global == len(offered):
        return ""
    others = "take the other lines, or " if num_global else ""
    return (
        f"strangers cannot use a private address: {others}forward the port in your router, and "
        "give the public address with `--announce-maddr`"
    )


def warning_of(identity_file: Path) -> str:
    """What to do about a key that others can read, as a copy that was put back; else empty."""
    if not identity_file.stat().st_mode & 0o077:
        return ""
    return f"others on this machine can read the run's key: `chmod 600 {identity_file}`"


def load_blobs(store: BlobStore, start: Start, directory: Path) -> None:
    """Make everything that the first manifest names available to others.

    What later ones name came into the store before they were signed.
    """
    files = [start.tokenizer_file, start.router_file]
    files += [start.shard_file(path) for path in start.topology.paths]
    files += [start.state_file(level.index) for level in start.topology.levels]
    files += [directory / ROUTER_DATA_FILE] if start.config.routing.phases else []
    for file in files:
        store.add_file(file)
