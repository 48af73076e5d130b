"""A module's certificates as one peer with a seat of its own would have made them, slot by slot."""

from __future__ import annotations

import hashlib

from dht.identity import Identity
from dipaco.topology import ModuleID
from peer.manifest import Manifest
from peer.messages import Ballot, Certificate, Commitment, Proposal, Seat, Vote, sign


def made_history(
    manifest: Manifest, module: ModuleID, who: Identity, *, num_versions: int, state: str
) -> list[Certificate]:
    """The last of them gives `state`; the states of the others are nowhere."""
    parent = base = manifest.starts[module.level].digest
    roster = (Seat(peer=who.peer_id, path=None),)
    path = str(manifest.topology.paths_through(module)[0])
    history: list[Certificate] = []
    for version in range(1, num_versions + 1):
        slot = version - 1
        commitment = Commitment(
            peer=who.peer_id,
            run=manifest.digest,
            manifest=manifest.digest,
            module=str(module),
            slot=slot,
            base_version=version - 1,
            base_state=base,
            path=path,
            tokens=1,
            blob="b" * 64,
            blob_bytes=10,
        )
        proposal = Proposal(
            run=manifest.digest,
            module=str(module),
            version=version,
            parent=parent,
            contributions=(sign(commitment, who),),
            roster=roster,
            rebuilt=version == 1,
            next_roster=roster,
        )
        made_up = hashlib.sha256(f"{module} {version} {who.peer_id}".encode()).hexdigest()
        base = state if version == num_versions else made_up
        ballot = Ballot(slot=slot, attempt=0, leader=who.peer_id)
        vote = Vote(peer=who.peer_id, ballot=ballot, proposal=proposal.digest, result=base)
        certificate = Certificate(
            proposal=proposal, ballot=ballot, result=base, votes=(sign(vote, who),)
        )
        history.append(certificate)
        parent = certificate.digest
    return history
