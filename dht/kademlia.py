"""The swarm over libp2p: hivemind's Kademlia DHT in this process's event loop.

One of the two doors to libp2p (`peer/rpc.py` is the other). hivemind is composed, never changed.
Its DHT trusts its peers, so this file closes what an attacker could use; `tests/attacks` shows each
attack, and that it works against stock hivemind:

- a node's place in the routing table is bound to its peer ID, which TLS proves: no routing entry
  is taken over by a ping or by a lie in a list of neighbors, and no ID is chosen to own a key;
- the storage holds records of ours only, is bounded, and a write that it refuses changes nothing;
- there is no cache that others can fill, so that what is read is fresh;
- an answer with more entries than a key can have is dropped before it is verified.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import ValueWithExpiration, get_dht_time

from dht.addresses import split_maddr
from dht.calls import watch_calls
from dht.errors import Offline, RunMismatch, Unreachable
from dht.records import MAX_CLOCK_SKEW_SECONDS, MAX_LIFETIME_SECONDS, encode
from dht.storage import RecordStorage
from dht.swarm import MAX_SUBKEYS, WITHDRAWAL_SECONDS, choose_expiration_time, readable
from dht.validation import check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from hivemind.dht.protocol import DHTProtocol

    from dht.calls import OnCall
    from dht.daemon import Daemon
    from dht.identity import Identity
    from dht.records import Record
    from dht.storage import Entry

Found = tuple[ValueWithExpiration | None, dict[DHTID, PeerID]]
"""One node's answer to a search: what it has under the key, and whom it knows nearby."""

log = logging.getLogger(__name__)
use_hivemind_log_handler("nowhere")  # what is worth a volunteer's attention, we say ourselves
logging.getLogger("hivemind").setLevel(logging.CRITICAL)

RPC_SECONDS = 3.0  # for one answer of one node
OPERATION_SECONDS = 20.0  # for one store or read, which asks many nodes
DIAL_SECONDS = 10.0
STRAGGLER_SECONDS = 1.0  # for other addresses to answer, once one has
CLOSE_SECONDS = 3.0  # to take leave of p2pd, which may be gone
NUM_REPLICAS = 5  # nodes that keep each record
BUCKET_SIZE = 20  # Kademlia's k: neighbors in an answer, nodes in a search
CONTROL_BUFFER_BYTES = 2**20  # of a stream from p2pd


class KademliaSwarm:
    """`dht.swarm.Swarm` over libp2p. Made by `KademliaSwarm.open`; must be closed."""

    p2p: P2P  # this one and the node are others after `reopen`
    _node: DHTNode

    def __init__(self, daemon: Daemon, identity: Identity) -> None:
        self._daemon = daemon
        self._identity = identity
        self.on_call: OnCall = lambda sent_bytes, received_bytes: None
        self._storage = RecordStorage(get_dht_time)
        self._published: dict[str, tuple[Record, float]] = {}  # by key, with its expiration time
        self._operations: set[asyncio.Timeout] = set()  # searches under way
        self._is_lost = False  # p2pd is gone, or given up, and `reopen` is yet to come
        self._is_closed = False

    @classmethod
    async def open(
        cls, daemon: Daemon, identity: Identity, *, initial_peers: Sequence[str] = ()
    ) -> KademliaSwarm:
        """Start a DHT node on `daemon`, and enter the swarm through any of `initial_peers`.

        These are addresses `/ip4/…/tcp/…/p2p/ID`; with none, the swarm begins here. A node that
        others cannot dial keeps nothing for them, and is not asked. Raises `Unreachable` if nobody
        answers, `RunMismatch` if our clock is off.
        """
        swarm = cls(daemon, identity)
        await swarm._start_node()
        try:
            await swarm.join(initial_peers)
        except BaseException:
            await swarm.p2p.shutdown()
            raise
        return swarm

    async def _start_node(self) -> None:
        p2p = await P2P.replicate(Multiaddr(self._daemon.control_maddr))
        try:
            node = await DHTNode.create(
                p2p=p2p,
                node_id=node_id_of(p2p.peer_id),
                bucket_size=BUCKET_SIZE,
                num_replicas=NUM_REPLICAS,
                wait_timeout=RPC_SECONDS,
                parallel_rpc=64,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
                client_mode=self._daemon.config.is_hidden,
                record_validator=_Validator(),
            )
        except BaseException:
            await p2p.shutdown()
            raise
        harden(node.protocol, self._storage)
        watch_calls(p2p._client.control, lambda *num_bytes: self.on_call(*num_bytes))
        self.p2p, self._node = p2p, node

    async def lose(self) -> None:
        """Take note that p2pd is gone: whatever waits for it fails as `Unreachable`, now."""
        if self._is_lost or self._is_closed:
            return
        self._is_lost = True
        self._node.is_alive = False
        for operation in self._operations:
            if not operation.expired():
                operation.reschedule(asyncio.get_running_loop().time())
        await self.p2p.shutdown()
        control = self.p2p._client.control
        for task in (control._read_task, control._write_task):
            if task.done() and not task.cancelled():
                task.exception()  # we know that it was cut; unasked, asyncio would log it

    async def reopen(self) -> None:
        """Work on the p2pd that has been started in place of the lost one; then `join` again.

        What this node kept for others is still there. Raises `Unreachable` if p2pd is gone again.
        """
        async with _bounded(DIAL_SECONDS, "p2pd does not answer"):
            await self._start_node()

    async def publish_again(self) -> None:
        """Store our live records once more, each until it was to expire anyway."""
        for key in list(self._published):
            if key not in self._published:
                continue  # it has expired while another one was stored
            record, expiration_time = self._published[key]  # which may be a newer one by now
            lifetime_seconds = expiration_time - self.now()
            if lifetime_seconds > 0:
                await self.store(record, min(lifetime_seconds, MAX_LIFETIME_SECONDS))

    @property
    def peer_id(self) -> str:
        """See `Swarm`."""
        return self._identity.peer_id

    def now(self) -> float:
        """See `Swarm`."""
        return float(get_dht_time())

    @property
    def num_neighbors(self) -> int:
        """How many DHT nodes this one knows."""
        return len(self._node.protocol.routing_table.uid_to_peer_id)

    async def maddrs(self) -> list[str]:
        """The addresses by which others may reach this peer now, each with its peer ID."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        async with _bounded(RPC_SECONDS, "p2pd does not answer"):
            response, _, writer = await ask_daemon(self.p2p, request)
        writer.close()
        return [f"{Multiaddr(raw)}/p2p/{self.peer_id}" for raw in response.identify.addrs]

    async def connections(self) -> dict[str, list[str]]:
        """The peers that p2pd is connected to: peer ID -> addresses `/ip4/…` they are seen at.

        Quick, so that a p2pd that does not answer this within seconds hangs. No timeout here.
        """
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
        response, _, writer = await ask_daemon(self.p2p, request)
        writer.close()
        seen: dict[str, list[str]] = {}
        for peer in response.peers:
            maddrs = seen.setdefault(str(PeerID(peer.id)), [])
            maddrs += [str(Multiaddr(raw)) for raw in peer.addrs]
        return seen

    async def join(self, initial_peers: Sequence[str]) -> None:
        """Enter the swarm, again if need be, through any of these addresses. See `open`.

        After `reopen` records are stored and found again from then on, even if this fails.
        """
        try:
            if initial_peers:
                await self._join(initial_peers)
        finally:
            self._is_lost = False

    async def _join(self, initial_peers: Sequence[str]) -> None:
        greetings = {asyncio.create_task(self._greet(maddr)) for maddr in initial_peers}
        try:
            await _until_one_succeeds(greetings)
            await asyncio.wait(greetings, timeout=STRAGGLER_SECONDS)
            done = [task for task in greetings if task.done()]
            errors = [error for task in done if (error := task.exception()) is not None]
        finally:
            for task in greetings:
                task.cancel()
            await asyncio.gather(*greetings, return_exceptions=True)
        for error in errors:
            log.debug("cannot enter through one of the addresses: %s", error)
            if not isinstance(error, Unreachable):
                raise error
        if len(errors) == len(greetings):
            raise errors[0]
        async with self._operation():
            await self._node.find_nearest_nodes([self._node.node_id])

    async def _greet(self, maddr: str) -> None:
        """Connect to a peer, compare clocks, and get into each other's routing table."""
        peer_id = await dial(self.p2p, maddr, timeout_seconds=DIAL_SECONDS)
        protocol = self._node.protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
        asked_time = self.now()
        try:
            stub = protocol.get_stub(PeerID.from_base58(peer_id))
            pong = await stub.rpc_ping(request, timeout=2 * RPC_SECONDS)  # it pings us, too
        except (P2PDaemonError, P2PHandlerError, TimeoutError) as e:
            raise Unreachable(
                f"`{maddr}` is there, but does not answer as a peer of a swarm",
                hint="is it the address that `dipaco-bootstrap serve` or a peer has printed?",
            ) from e
        check_clock(asked_time, pong.dht_time, self.now(), peer_id)
        await protocol.update_routing_table(
            DHTID.from_bytes(pong.peer.node_id), PeerID.from_base58(peer_id), responded=True
        )

    async def store(self, record: Record, lifetime_seconds: float) -> bool:
        """See `Swarm`. Raises `Unreachable` if p2pd is gone or the search takes too long."""
        self._require_open()
        _, previous_time = self._published.get(record.key, (record, float("-inf")))
        if await self._store_after(previous_time, record, lifetime_seconds):
            return True
        # an earlier life of this peer may have left a record that expires later than this one
        entries = await self._entries(record.key)
        _, previous_time = entries.get(self.peer_id, (b"", previous_time))
        return await self._store_after(previous_time, record, lifetime_seconds)

    async def _store_after(
        self, previous_time: float, record: Record, lifetime_seconds: float
    ) -> bool:
        expiration_time = choose_expiration_time(self.now(), lifetime_seconds, previous_time)
        raw = encode(record, self._identity, expiration_time)
        self._remember(record, expiration_time)  # now: one that is stored meanwhile comes later
        async with self._operation():
            stored = await self._node.store(record.key, raw, expiration_time, subkey=self.peer_id)
        return bool(stored)

    def _remember(self, record: Record, expiration_time: float) -> None:
        now = self.now()
        alive = {key: (r, time) for key, (r, time) in self._published.items() if time > now}
        self._published = {**alive, record.key: (record, expiration_time)}

    async def read(self, key: str) -> list[Record]:
        """See `Swarm`. Raises `Unreachable` if p2pd is gone or the search takes too long."""
        self._require_open()
        entries = await self._entries(key)
        return readable(entries, key=key, reader=self.peer_id, now=self.now())

    async def _entries(self, key: str) -> dict[str, tuple[bytes, float]]:
        """What lies under `key` at all nodes that are responsible for it."""
        async with self._operation():
            found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        return {subkey: (raw, time) for subkey, (raw, time) in found.value.items()}

    async def withdraw(self, record: Record) -> None:
        """See `Swarm`. What cannot be taken back now is not published again, and expires."""
        try:
            await self.store(record.model_copy(update={"withdrawn": True}), WITHDRAWAL_SECONDS)
        except Unreachable:
            self._published.pop(record.key, None)

    async def close(self) -> None:
        """See `Swarm`. The daemon ends by itself then, but still wants to be closed."""
        if self._is_closed:
            return
        self._is_closed = True
        self._node.is_alive = False
        with suppress(TimeoutError, P2PDaemonError, OSError):
            is_there = self._daemon.alive and not self._is_lost
            async with asyncio.timeout(CLOSE_SECONDS if is_there else 0):
                await self._node.shutdown()
        await self.p2p.shutdown()
        await asyncio.sleep(0)  # lets hivemind's cancelled tasks close their sockets

    def _require_open(self) -> None:
        if self._is_closed:
            raise Offline("this peer has left")
        if self._is_lost or not self._daemon.alive:
            raise Offline("this peer's p2pd has ended")

    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[None]:
        """Bound a search of the DHT, also by the life of p2pd."""
        why = f"no answer from the DHT within {OPERATION_SECONDS:.0f} s"
        async with _bounded(OPERATION_SECONDS, why) as timeout:
            self._operations.add(timeout)
            try:
                yield
            finally:
                self._operations.discard(timeout)


def node_id_of(peer_id: PeerID) -> DHTID:
    """The only place in the DHT that a peer can have: the SHA-1 of its peer ID."""
    return DHTID.generate(source=peer_id.to_bytes())


def check_clock(asked_time: float, their_time: float, answered_time: float, peer_id: str) -> None:
    """Raise `RunMismatch` if our clock differs from `peer_id`'s by more than the swarm allows."""
    tolerance = MAX_CLOCK_SKEW_SECONDS
    if asked_time - tolerance <= their_time <= answered_time + tolerance:
        return
    seconds = (asked_time + answered_time) / 2 - their_time
    side = "ahead of" if seconds > 0 else "behind"
    raise RunMismatch(
        f"your clock is {abs(seconds):.0f} s {side} that of {peer_id}; "
        f"{tolerance:.0f} s are allowed",
        hint="let the system set its clock: `sudo timedatectl set-ntp true`",
    )


async def _until_one_succeeds(tasks: Collection[asyncio.Task[None]]) -> None:
    """Until one is done without an exception, or all are done."""
    for finished in asyncio.as_completed(tasks):
        with suppress(Exception):
            await finished
            return


@asynccontextmanager
async def _bounded(seconds: float, why: str) -> AsyncIterator[asyncio.Timeout]:
    """Raise `Unreachable` if the body takes longer than that, or p2pd fails it."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except TimeoutError as e:
        raise Unreachable(why) from e
    except (P2PDaemonError, P2PHandlerError, OSError, EOFError) as e:
        raise Offline("this peer's p2pd has ended") from e


async def dial(p2p: P2P, maddr: str, *, timeout_seconds: float) -> str:
    """Connect p2pd to the peer at `maddr`, and return its peer ID. Raises `Unreachable`.

    From then on it, and whom it knows, can be reached by peer ID alone.
    """
    where, peer_id = split_maddr(maddr)
    connect = p2pd_pb2.ConnectRequest(
        peer=PeerID.from_base58(peer_id).to_bytes(), addrs=[Multiaddr(where).to_bytes()]
    )
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
    try:
        async with asyncio.timeout(timeout_seconds):
            _, _, writer = await ask_daemon(p2p, request)
    except (Unreachable, TimeoutError) as e:
        why = "no answer in time" if isinstance(e, TimeoutError) else str(e)
        raise Unreachable(
            f"cannot reach `{maddr}`: {why}",
            hint="check the address, and that the peer there is running and not behind a firewall",
        ) from e
    writer.close()
    return peer_id


async def ask_daemon(
    p2p: P2P, request: p2pd_pb2.Request, *, buffer_bytes: int = CONTROL_BUFFER_BYTES
) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send p2pd a request on a connection of its own; (response, reader, writer) if it agrees.

    hivemind's own calls leave the connection open when p2pd refuses or the caller gives up.
    Raises `Unreachable` with p2pd's reason, `Offline` if p2pd is gone.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(
            p2p._daemon_listen_maddr["unix"], limit=buffer_bytes
        )
    except OSError as e:
        raise Offline("this peer's p2pd has ended") from e
    try:
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        if response.type == p2pd_pb2.Response.ERROR:
            raise Unreachable(_reason(response.error.msg))
    except BaseException as e:
        writer.close()
        if isinstance(e, OSError | EOFError):
            raise Offline("this peer's p2pd has ended") from e
        raise
    return response, reader, writer


def _reason(message: str) -> str:
    """The one line of p2pd's error that tells a person most: about the latest thing it tried."""
    lines = [line.strip(" *")[:300] for line in message.splitlines() if line.strip()]
    fresh = [line for line in lines if "dial backoff" not in line]
    return (fresh or lines or ["refused"])[-1]


class _Validator(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's hook for `dht.validation`: called before storing, and on what was found."""

    def validate(self, record: DHTRecord) -> bool:
        return check(
            key_bytes=record.key,
            subkey_bytes=record.subkey,
            value_bytes=record.value,
            expiration_time=record.expiration_time,
            now=get_dht_time(),
        )


class _Storage:
    """`RecordStorage` as hivemind's `DHTLocalStorage`: the same methods, and its types."""

    def __init__(self, storage: RecordStorage) -> None:
        self._storage = storage

    def store(
        self, key: DHTID, value: object, expiration_time: float, subkey: str | None = None
    ) -> bool:
        """Only entries of dictionaries are taken."""
        if subkey is None or not isinstance(value, bytes):
            return False
        return self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        return self._storage.store(key.to_bytes(), subkey, value, expiration_time)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        entries = self._storage.get(key.to_bytes())
        return _dictionary(entries) if entries else None

    def items(self) -> list[tuple[DHTID, ValueWithExpiration]]:
        keys = self._storage.keys()
        return [(DHTID.from_bytes(key), _dictionary(self._storage.get(key))) for key in keys]


class _NoCache:
    """In place of hivemind's cache, which others could fill, and which answers before storage."""

    def store(self, *_: object, **__: object) -> bool:
        return False

    store_subkey = store

    def get(self, key: DHTID) -> None:
        """Nothing is ever there."""

    def __contains__(self, key: DHTID) -> bool:
        return False


def _dictionary(entries: Mapping[str, Entry]) -> ValueWithExpiration:
    """hivemind's type for a dictionary of records, with the latest expiration time in it.

    It is frozen, since otherwise merging in an older copy of an entry would remove the newer one.
    """
    dictionary = DictionaryDHTValue()
    dictionary.frozen = True
    for subkey, (value, expiration_time) in entries.items():
        dictionary.store(subkey, value, expiration_time)
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)


def harden(protocol: DHTProtocol, storage: RecordStorage) -> None:
    """Close the holes that the module's docstring names, in a node's `DHTProtocol`."""
    protocol.storage = _Storage(storage)
    protocol.cache = _NoCache()
    update_routing_table = protocol.update_routing_table
    call_find = protocol.call_find
    is_dictionary_valid = protocol._validate_dictionary

    async def update_if_genuine(
        node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        known_id = node_id_of(peer_id)
        if node_id is None or node_id == known_id:
            await update_routing_table(known_id, peer_id, responded=responded)

    async def find_genuine(peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, Found] | None:
        found = await call_find(peer, keys)
        return found and {key: _genuine(*answer) for key, answer in found.items()}

    def is_small_and_valid(key_bytes: bytes, dictionary: object) -> bool:
        is_small = isinstance(dictionary, DictionaryDHTValue) and len(dictionary) <= MAX_SUBKEYS
        return is_small and bool(is_dictionary_valid(key_bytes, dictionary))

    protocol.update_routing_table = update_if_genuine
    protocol.call_find = find_genuine
    protocol._validate_dictionary = is_small_and_valid


def _genuine(value: ValueWithExpiration | None, neighbors: dict[DHTID, PeerID]) -> Found:
    """A node's answer to a search, without what it made up: (value, node ID -> peer ID)."""
    genuine = {n: p for n, p in neighbors.items() if n == node_id_of(p)}
    nearest = dict(list(genuine.items())[:BUCKET_SIZE])
    if value is None or not isinstance(value.value, DictionaryDHTValue):
        return None, nearest
    return _dictionary({k: (v, t) for k, (v, t) in value.value.data.items()}), nearest
