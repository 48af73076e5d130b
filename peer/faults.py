"""What other peers did wrong, counted. A remote fault is data about that peer, never our crash."""

from collections import Counter

from dht.errors import Offline, SwarmError
from peer.events import EventLog

MAX_PEERS_COUNTED = 4096


class Faults:
    """Counts faults by peer and kind and writes each to the event log."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self.by_peer: dict[str, Counter[str]] = {}

    def count(self, error: SwarmError, peer_id: str) -> None:
        """Remember one fault of `peer_id`; that we are cut off ourselves is none of its."""
        if isinstance(error, Offline):
            return
        kind = type(error).__name__
        if peer_id in self.by_peer or len(self.by_peer) < MAX_PEERS_COUNTED:
            self.by_peer.setdefault(peer_id, Counter())[kind] += 1
        self._events.write("fault", peer=peer_id, kind=kind, why=str(error))

    @property
    def total(self) -> int:
        """All faults counted so far."""
        return sum(sum(kinds.values()) for kinds in self.by_peer.values())
