"""The swarm over libp2p: hivemind's Kademlia DHT in this process's event loop.

One of the two doors to libp2p (`peer/rpc.py` is the other). It stands on three files:
`dht.daemon` runs p2pd, `dht.control` talks to it, and `dht.hardening` makes hivemind's DHT, which
trusts its peers, safe against hostile ones.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import get_dht_time

from dht.calls import watch_calls
from dht.control import dial, identify, list_peers
from dht.errors import LocalFault, Offline, RunMismatch, Unreachable
from dht.hardening import Validator, harden, node_id_of
from dht.records import MAX_CLOCK_SKEW_SECONDS, MAX_LIFETIME_SECONDS, encode
from dht.storage import RecordStorage
from dht.swarm import WITHDRAWAL_SECONDS, choose_expiration_time, readable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from dht.calls import OnCall
    from dht.daemon import Daemon
    from dht.identity import Identity
    from dht.records import Record

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
                record_validator=Validator(),
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
    def neighbors(self) -> set[str]:
        """The peer IDs of the DHT nodes that this one knows. One failed call, and it forgets."""
        return {str(peer) for peer in self._node.protocol.routing_table.peer_id_to_uid}

    async def maddrs(self) -> list[str]:
        """The addresses by which others may reach this peer now, each with its peer ID."""
        async with _bounded(RPC_SECONDS, "p2pd does not answer"):
            places = await identify(self.p2p)
        return [f"{place}/p2p/{self.peer_id}" for place in places]

    async def connections(self) -> dict[str, list[str]]:
        """The peers that p2pd is connected to: peer ID -> addresses `/ip4/…` they are seen at.

        Quick, so that a p2pd that does not answer this within seconds hangs. No timeout here.
        `Unreachable` also when hivemind has stopped listening to p2pd, which an answer that comes
        at the instant when it is no longer waited for can do to it: then no call would come back.
        """
        control = self.p2p._client.control
        if control._read_task.done() or control._write_task.done():
            raise Unreachable("what p2pd answers is no longer read")
        return await list_peers(self.p2p)

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
        if len(errors) == len(greetings):  # else one wrong peer would keep us from all others
            raise next((e for e in errors if not isinstance(e, Unreachable)), errors[0])
        await self._look_around()

    async def meet(self, maddrs: Sequence[str]) -> None:
        """Get to know the DHT nodes at these addresses, too, and whom they know near this one.

        Waits for the slowest; who does not answer is left out.
        """
        errors = await asyncio.gather(*map(self._greet, maddrs), return_exceptions=True)
        for error in filter(None, errors):
            log.debug("cannot get to know one of the peers: %s", error)
        if None in errors:
            await self._look_around()

    async def _look_around(self) -> None:
        """Find the nodes that are nearest to this one; all who are asked on the way learn of it."""
        async with self._operation():
            await self._node.find_nearest_nodes([self._node.node_id])

    async def _greet(self, maddr: str) -> None:
        """Connect to a peer, compare clocks, and get into each other's routing table.

        Whatever it answers is at worst `Unreachable`, or `RunMismatch` if the clocks differ.
        """
        try:
            peer_id = await dial(self.p2p, maddr, timeout_seconds=DIAL_SECONDS)
        except LocalFault as e:  # p2pd also connects to what is no peer of any run
            raise Unreachable(str(e), hint=e.hint) from e
        protocol, peer = self._node.protocol, PeerID.from_base58(peer_id)
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
        asked_time = self.now()
        try:
            stub = protocol.get_stub(peer)
            pong = await stub.rpc_ping(request, timeout=2 * RPC_SECONDS)  # it pings us, too
        except (P2PDaemonError, P2PHandlerError, DecodeError, TimeoutError) as e:
            raise Unreachable(
                f"`{maddr}` is there, but does not answer as a peer of a swarm",
                hint="is it the address that `dipaco-bootstrap serve` or a peer has printed?",
            ) from e
        check_clock(asked_time, pong.dht_time, self.now(), peer_id)
        if pong.peer.node_id == node_id_of(peer).to_bytes():  # who only reads the DHT gives none
            await protocol.update_routing_table(node_id_of(peer), peer, responded=True)

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
