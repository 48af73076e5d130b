"""What may go from a peer's disk: what nothing refers to any more, and what it keeps for others."""

from dipaco.topology import PathID
from peer.member import Member
from peer.modules import STATES_KEPT
from peer.node import Node
from peer.presence import Presence

UNREFERENCED_SECONDS = 600.0  # at least, before a blob that nothing refers to is deleted


class Housekeeping:
    """Deletes blobs of one peer; on any thread."""

    def __init__(self, node: Node, member: Member, presence: Presence) -> None:
        self._node = node
        self._member = member
        self._presence = presence
        self._round_seconds = node.history.first.run_config.rounds.round_seconds

    def sweep(self) -> None:
        """Delete blobs that nothing refers to: votes that came to nothing, old contributions."""
        self._sweep(max(UNREFERENCED_SECONDS, 3 * self._round_seconds))

    def make_room(self, excess_bytes: int, *, own_shard: PathID | None) -> None:
        """The store is at its limit: delete what nothing refers to, then what is for others only.

        What a round under way may need is young, and stays. Without an `own_shard`, being there for
        others is all that this peer is for.
        """
        node = self._node
        self._sweep(2 * self._round_seconds)
        if own_shard is None:
            return
        for manifest in node.history.since(node.slot):
            for path in manifest.topology.paths:
                if path != own_shard and excess_bytes > 0:
                    ref = manifest.shard(path).blob
                    excess_bytes -= ref.num_bytes if ref.digest in node.store else 0
                    node.store.remove(ref.digest)

    def _sweep(self, min_seconds: float) -> None:
        node = self._node
        kept = self._referenced()
        for digest in node.store.digests():
            if digest not in kept and node.store.age_seconds(digest) > min_seconds:
                node.store.remove(digest)
        node.store.remove_leftovers(min_seconds)

    def _referenced(self) -> set[str]:
        """Blobs that this peer has a use for, or others may ask it for."""
        node = self._node
        kept = {manifest.digest for manifest in node.history.versions}
        for manifest in node.history.since(node.slot):
            kept.update(ref.digest for ref in (*manifest.data, *manifest.origins))
        kept.update(scores.blob for scores in list(self._presence.scores.values()))
        kept |= self._member.bound_blobs()
        for held in list(node.log.held.values()):
            kept.add(held.state)
            kept.update(certificate.result for certificate in held.chain[-STATES_KEPT:])
        for certificates in node.log.resumable().values():  # not all are held again yet
            kept.update(certificate.result for certificate in certificates)
            kept.update(c.blob for c in certificates[-1].proposal.contributions)
        return kept
