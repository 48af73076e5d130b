"""Opening a peer on this machine: state directory, p2pd, DHT, transport, the run's manifest.

Everything is released in reverse order when the context ends, however it ends: no process and no
socket file stays behind.
"""

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dht.addresses import is_loopback, peer_of
from dht.daemon import Daemon, DaemonConfig
from dht.errors import PeerFault, RunMismatch, Unreachable
from dht.identity import Identity
from dipaco.imports import heavy_imports
from dipaco.locking import working_in
from peer.address_book import AddressBook
from peer.blobs import BlobClient
from peer.config import PeerConfig
from peer.dial_back import DialBack
from peer.discovery import Discovery
from peer.events import EventLog
from peer.faults import Faults
from peer.hello import say_hello
from peer.history import History
from peer.manifest import MAX_MANIFEST_BYTES, Manifest, check_protocol, parse_manifest
from peer.modules import ModuleLog
from peer.node import Node
from peer.ports import as_before, keep_port
from peer.providers import Providers
from peer.reachability import Reachability
from peer.store import BlobStore
from peer.throttle import Meter
from peer.watchdog import Watchdog

if TYPE_CHECKING:
    from dht.kademlia import KademliaSwarm
    from peer.rpc import Libp2pTransport

ADDRESS_FILE = "address"  # of this peer; the other has those of others
ADDRESS_BOOK_FILE = "peers.json"
PORT_FILE = "port"
MANIFEST_TIMEOUT_SECONDS = 60.0
WANTED_OPEN_FILES = 16384  # one per stream and blob; many systems give 1024 unless asked
# One directory is one identity. An operator has but one, that of the run.
_ANOTHER_DIR = "as a volunteer, take another one with `--state-dir DIR`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A peer's doors to the network, before it knows of any run."""

    identity: Identity
    daemon: Daemon
    swarm: "KademliaSwarm"
    transport: "Libp2pTransport"
    watchdog: Watchdog
    reachability: Reachability


@asynccontextmanager
async def open_network(
    config: PeerConfig,
    *,
    known_maddrs: Callable[[], Sequence[str]] = tuple,
    launcher: tuple[str, ...] = (),
) -> AsyncIterator[Network]:
    """Start p2pd with this machine's identity and enter the DHT through `config.initial_peers`.

    `known_maddrs` gives addresses of earlier days, which are tried, too, now and whenever this peer
    is alone. Who has such may find nobody; for everyone else that is `Unreachable`. `launcher` is a
    command that runs p2pd, such as `nsenter`.
    """
    with heavy_imports():  # not before: hivemind takes seconds, and not every command needs it
        from dht.kademlia import KademliaSwarm
        from peer.rpc import Libp2pTransport

    raise_open_files()
    async with AsyncExitStack() as stack:
        stack.enter_context(working_in(config.state_dir, otherwise=_ANOTHER_DIR))
        identity_file = config.state_dir / "identity"
        identity = Identity.load_or_create(identity_file)
        is_local = all(is_loopback(maddr) for maddr in config.host_maddrs)
        daemon = await Daemon.start(
            identity_file,
            config=DaemonConfig(
                host_maddrs=as_before(config.host_maddrs, config.state_dir / PORT_FILE),
                announce_maddrs=config.announce_maddrs,
                map_port=not (config.client_mode or is_local),
                client_mode=config.client_mode,
                relay_service=config.relays,
                launcher=launcher,
            ),
        )
        stack.push_async_callback(daemon.close)
        swarm = await KademliaSwarm.open(daemon, identity)
        stack.push_async_callback(swarm.close)
        try:
            await swarm.join([*config.initial_peers, *known_maddrs()])
        except Unreachable:
            if not known_maddrs():
                raise
        keep_port(daemon.listening, config.state_dir / PORT_FILE)
        meter = Meter(config.max_bytes_per_second)
        swarm.on_call = meter.called
        transport = Libp2pTransport(swarm.p2p, meter=meter)
        stack.push_async_callback(transport.close)
        watchdog = Watchdog(
            daemon,
            swarm,
            transport,
            initial_peers=config.initial_peers,
            known_maddrs=known_maddrs,
        )
        await stack.enter_async_context(watchdog.running())
        await DialBack(swarm, transport, is_relay=config.relays).serve()
        yield Network(
            identity=identity,
            daemon=daemon,
            swarm=swarm,
            transport=transport,
            watchdog=watchdog,
            reachability=Reachability(swarm, transport, watchdog),
        )


def raise_open_files() -> int:
    """Raise this process's limit on open files as far as it may; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(WANTED_OPEN_FILES, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):  # macOS has another limit, of the system
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRun:
    """The run that an address belongs to, and who told us: peer ID and its newest manifest."""

    run: str
    newest: dict[str, str]


async def find_run(
    network: Network, initial_peers: Sequence[str], books: Iterable[AddressBook] = ()
) -> FoundRun:
    """Ask every given address which run it is in.

    If none answers, that is the run on this disk whose peers it is known to be one of. Raises
    `Unreachable` if there is none, `RunMismatch` if they differ or speak another protocol.
    """
    try:
        return await _ask_for_run(network, initial_peers)
    except Unreachable:
        names = [peer_of(maddr) for maddr in initial_peers]
        known = [book for book in books if any(name in book for name in names)]
        if len(known) != 1:
            raise
        [book] = known
    try:
        found = await _ask_for_run(network, book.maddrs)
    except (Unreachable, RunMismatch):
        return FoundRun(run=book.run, newest={})
    return found if found.run == book.run else FoundRun(run=book.run, newest={})


async def _ask_for_run(network: Network, maddrs: Sequence[str]) -> FoundRun:
    names = list(dict.fromkeys(map(peer_of, maddrs)))
    names = [name for name in names if name != network.transport.peer_id]  # does not ask itself
    replies = await asyncio.gather(
        *(say_hello(network.transport, name) for name in names), return_exceptions=True
    )
    answers = {}
    problems = []
    for name, reply in zip(names, replies, strict=True):
        if isinstance(reply, (PeerFault, Unreachable)):
            problems.append(reply)
        elif isinstance(reply, BaseException):
            raise reply
        else:
            check_protocol(reply.protocol, "that peer")
            answers[name] = reply
    if not answers:
        why = problems[0] if problems else "no address of another peer was given"
        raise Unreachable(
            f"no answer about its run: {why}",
            hint="use the address that `dipaco-bootstrap serve`, or a running peer, prints",
        )
    runs = {reply.run for reply in answers.values()}
    if len(runs) > 1:
        raise RunMismatch(
            "these addresses belong to different runs",
            hint="give addresses of one run only: " + ", ".join(sorted(runs)),
        )
    newest = {name: reply.manifest for name, reply in answers.items()}
    return FoundRun(run=runs.pop(), newest=newest)


async def enter_run(network: Network, found: FoundRun, run_dir: Path) -> Node:
    """Fetch the run's manifest, and its newest version; returns what a peer of it works with."""
    manifest = await _fetch_first(network, found, run_dir)
    node = make_node(network, manifest=manifest, run_dir=run_dir)
    discovery = Discovery(node)
    for peer, digest in found.newest.items():
        await discovery.ask(digest, peer)
    await discovery.look()
    return node


async def _fetch_first(network: Network, found: FoundRun, run_dir: Path) -> Manifest:
    """The manifest that names the run, from disk or from whoever told us of it, verified."""
    store = BlobStore(run_dir / "blobs")
    if found.run not in store:
        events = EventLog(run_dir / "events.jsonl", network.swarm.now)
        client = BlobClient(store, network.transport, Faults(events))
        try:
            await client.fetch(
                found.run,
                list(found.newest),
                max_bytes=MAX_MANIFEST_BYTES,
                timeout_seconds=MANIFEST_TIMEOUT_SECONDS,
            )
        finally:
            events.close()
    raw = store.read(found.run)
    if raw is None:
        raise Unreachable("the manifest was damaged on disk", hint="start again to fetch it anew")
    return parse_manifest(raw, digest=found.run, sender=next(iter(found.newest), "this disk"))


def run_directory(state_dir: Path, run: str) -> Path:
    """Where the state of one run lies; made if it does not exist."""
    directory = state_dir / "runs" / run[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def address_book(run_dir: Path, run: str) -> AddressBook:
    """The addresses of the others in a run, in the directory of its state."""
    return AddressBook(run_dir / ADDRESS_BOOK_FILE, run)


def make_node(network: Network, *, manifest: Manifest, run_dir: Path) -> Node:
    """Everything a peer works with, for the run of this first manifest."""
    events = EventLog(run_dir / "events.jsonl", network.swarm.now)
    network.watchdog.report = partial(_report, events)
    store = BlobStore(run_dir / "blobs")
    faults = Faults(events)
    history = History(manifest, store, run_dir / "manifests")
    return Node(
        identity=network.identity,
        history=history,
        swarm=network.swarm,
        transport=network.transport,
        store=store,
        blobs=BlobClient(store, network.transport, faults),
        log=ModuleLog(run_dir / "modules", history, store),
        events=events,
        faults=faults,
        offload=asyncio.to_thread,
        state_dir=run_dir,
    )


def _report(events: EventLog, event: str, **fields: object) -> None:
    """Log an event of the network, which outlives its node."""
    if not events.is_closed:
        events.write(event, **fields)


@asynccontextmanager
async def open_node(
    config: PeerConfig,
) -> AsyncIterator[tuple[Node, Providers, Network, AddressBook]]:
    """Join the network and the run that `config.initial_peers` belong to."""
    books = [AddressBook(file) for file in config.state_dir.glob(f"runs/*/{ADDRESS_BOOK_FILE}")]

    def known_maddrs() -> list[str]:
        return [maddr for book in books for maddr in book.maddrs]

    async with open_network(config, known_maddrs=known_maddrs) as network:
        found = await find_run(network, config.initial_peers, books)
        run_dir = run_directory(config.state_dir, found.run)
        node = await enter_run(network, found, run_dir)
        providers = Providers(node.swarm, node.store, node.blobs)
        providers.hints.extend(found.newest)
        book = next((book for book in books if book.run == found.run), None)
        if book is None:
            book = address_book(run_dir, found.run)
            books.append(book)
        given = {peer_of(maddr): [maddr] for maddr in config.initial_peers}
        book.note({peer: maddrs for peer, maddrs in given.items() if peer in found.newest})
        try:
            yield node, providers, network, book
        finally:
            node.events.close()
