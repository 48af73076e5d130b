"""What only the holder of the run's key can do: give the run its next manifest."""

from dipaco.checkpoint import state_bytes
from peer.manifest import BlobRef, Manifest, Origin
from peer.messages import sign
from peer.node import Node
from peer.succession import Draft, successor

NOTICE_SLOTS = 3  # from one that is signed until it is in force: everyone has heard of it by then


def issue(node: Node, draft: Draft) -> Manifest:
    """Sign the next version of the manifest and take it up; everything it names is in the store.

    It comes into force `NOTICE_SLOTS` from now. New modules are born from the versions held here.
    """
    history = node.history
    newest = {
        module: Origin(
            version=held.version,
            state=BlobRef(
                digest=held.state, num_bytes=state_bytes(node.log.num_parameters(module))
            ),
        )
        for module, held in node.log.held.items()
    }
    first_slot = max(0, node.slot, history.newest.first_slot) + NOTICE_SLOTS
    unsigned = successor(history.newest, draft, first_slot=first_slot, newest=newest)
    manifest = sign(unsigned, node.identity)
    history.add(manifest, sender=node.peer_id)
    node.events.write(
        "issued",
        version=manifest.version,
        digest=manifest.digest,
        first_slot=first_slot,
        levels=list(manifest.topology.shape),
        num_phases=manifest.num_phases,
    )
    return manifest
