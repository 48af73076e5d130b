"""What every part of a peer works with: identity, run, doors to the network, disk."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from dht.identity import Identity
from dht.swarm import Swarm
from peer.blobs import BlobClient
from peer.events import EventLog
from peer.faults import Faults
from peer.history import History
from peer.manifest import Manifest
from peer.modules import ModuleLog
from peer.store import BlobStore
from peer.transport import Transport

T = TypeVar("T")


class Offload(Protocol):
    """Runs a function off the event loop (`asyncio.to_thread`); inline under a virtual clock."""

    def __call__(self, function: Callable[[], T], /) -> Coroutine[object, object, T]:
        """The function's result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One peer's means; holds no decisions of its own."""

    identity: Identity
    history: History
    swarm: Swarm
    transport: Transport
    store: BlobStore
    blobs: BlobClient
    log: ModuleLog
    events: EventLog
    faults: Faults
    offload: Offload
    state_dir: Path

    @property
    def peer_id(self) -> str:
        """This peer's libp2p ID."""
        return self.identity.peer_id

    @property
    def run(self) -> str:
        """The run's name: the digest of its first manifest."""
        return self.history.first.digest

    @property
    def manifest(self) -> Manifest:
        """The version of the manifest that is in force now."""
        return self.history.at(self.slot)

    def now(self) -> float:
        """The common clock, Unix seconds."""
        return self.swarm.now()

    @property
    def slot(self) -> int:
        """The current slot; negative before the run starts."""
        return self.history.first.slot_at(self.now())
