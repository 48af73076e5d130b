"""From a version of a module and agreed contributions to the next one: the same bits everywhere.

Done for a vote, for a certificate, and by whoever comes back after a crash and finds certificates
on its disk whose states had not got there.
"""

from collections.abc import Sequence

import numpy as np

from dht.errors import Unreachable
from dipaco.checkpoint import ModuleState
from dipaco.compression import EncodedGradient, WireFormat
from dipaco.errors import BadContribution
from dipaco.outer import OuterUpdate, apply_contributions, contribution_weights
from dipaco.topology import ModuleID, PathID
from peer.manifest import Manifest
from peer.messages import Commitment, Proposal
from peer.store import BlobStore


def merged_format(wire_format: WireFormat) -> WireFormat:
    """How the average of several encoded outer gradients travels.

    With 8 bits at least: nobody has a residual of what is lost once more.
    """
    return wire_format if wire_format in ("float32", "float16") else "int8"


def format_of(commitment: Commitment, manifest: Manifest) -> WireFormat:
    """How the bytes of a commitment are encoded; `manifest` is the one that it names."""
    wire_format = manifest.run_config.outer.wire_format
    return merged_format(wire_format) if commitment.merged else wire_format


def mapped_gradient(
    commitment: Commitment, store: BlobStore, manifest: Manifest, *, num_parameters: int
) -> EncodedGradient:
    """The outer gradient of a commitment, mapped from the disk; its values are not checked.

    `manifest` is the one that the commitment names. Raises `BadContribution` if the blob is not an
    outer gradient of its module, `Unreachable` if it is not here.
    """
    index = store.index(commitment.blob)
    if index is not None and index.size != commitment.blob_bytes:  # an empty one cannot be mapped
        raise BadContribution(f"a blob of {index.size} bytes, not {commitment.blob_bytes}")
    file = store.intact_file(commitment.blob)
    if file is None:
        raise Unreachable(f"contribution {commitment.blob[:12]} is not on disk, or damaged")
    return EncodedGradient(
        np.memmap(file, dtype=np.uint8, mode="r").data,
        format_of(commitment, manifest),
        num_parameters=num_parameters,
    )


def reduce(
    proposal: Proposal,
    before: ModuleState,
    gradients: Sequence[EncodedGradient],
    manifest: Manifest,
) -> OuterUpdate:
    """Paper, Algorithm 1 lines 13-14: contribution by contribution, in the proposal's order."""
    paths = [PathID.parse(c.path) for c in proposal.contributions]
    weights = contribution_weights(
        [(path, c.tokens) for path, c in zip(paths, proposal.contributions, strict=True)],
        manifest.shard_tokens,
    )
    weighted = zip(weights, gradients, strict=True)
    # Whoever contributes: a rate by paths is meant for the module, not for a round of it.
    num_paths = manifest.topology.num_paths_through(ModuleID.parse(proposal.module))
    outer = manifest.run_config.outer.of_module(num_paths)
    return apply_contributions(before, weighted, len(set(paths)), outer)
