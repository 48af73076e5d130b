"""The signed description of a run: everything that the swarm must agree on, and nothing else.

The operator's key signs it once; then any peer can hand it to a newcomer, because its digest
names the run and the signature inside proves who made it. A volunteer's own choices (device, disk,
bandwidth) are never in it.
"""

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from dht.errors import BadMessage, RunMismatch
from dipaco.config import RunConfig
from dipaco.digest import blob_digest
from dipaco.topology import ModuleID, PathID, Topology
from peer.messages import (
    PROTOCOL_VERSION,
    Digest,
    Message,
    PathName,
    SignedMessage,
    Version,
)

# One shard reference is about 200 bytes; this is room for 64k paths.
MAX_MANIFEST_BYTES = 16 * 2**20


class BlobRef(Message):
    """Names a blob and its size in bytes."""

    digest: Digest
    num_bytes: Annotated[int, Field(ge=1, le=2**45)]


class ShardRef(Message):
    """The shard of one path."""

    path: PathName
    blob: BlobRef
    tokens: Annotated[int, Field(ge=1, le=2**53)]  # training tokens: the path's weight


class Manifest(SignedMessage):
    """One version of a run's description; `peer` is the operator."""

    protocol: Annotated[int, Field(ge=0, le=2**31)]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    version: Version
    start_time: Annotated[
        float, Field(ge=0, le=1e11, allow_inf_nan=False)
    ]  # of slot 0, Unix seconds
    fingerprint: Digest  # of the run configuration
    config: dict[str, Any]
    tokenizer: BlobRef
    router: BlobRef
    shards: Annotated[tuple[ShardRef, ...], Field(min_length=1, max_length=2**16)]
    starts: Annotated[tuple[BlobRef, ...], Field(min_length=1, max_length=2**10)]  # state per level

    @cached_property
    def run_config(self) -> RunConfig:
        """The run configuration."""
        return RunConfig.from_dict(self.config)

    @cached_property
    def topology(self) -> Topology:
        """Levels, modules and paths of the run."""
        return Topology.of(self.run_config)

    @cached_property
    def shard_tokens(self) -> dict[PathID, int]:
        """Training tokens of every path's shard: the weights of the outer step."""
        return {PathID.parse(shard.path): shard.tokens for shard in self.shards}

    def shard(self, path: PathID) -> ShardRef:
        """The shard reference of `path`."""
        return self._shard_by_name[str(path)]

    @cached_property
    def _shard_by_name(self) -> dict[str, ShardRef]:
        return {shard.path: shard for shard in self.shards}

    def start_state(self, module: ModuleID) -> BlobRef:
        """Version 0 of a module: all modules of a level start equal (paper, Algorithm 1)."""
        return self.starts[module.level]

    def slot_at(self, now: float) -> int:
        """The slot of the common clock at `now`; negative before the run starts."""
        return int((now - self.start_time) // self.run_config.rounds.round_seconds)

    def slot_start(self, slot: int) -> float:
        """Unix time, in seconds, at which `slot` begins."""
        return self.start_time + slot * self.run_config.rounds.round_seconds


def parse_manifest(raw: bytes, *, digest: str, sender: str) -> Manifest:
    """Check a manifest's bytes and signature.

    Raises `BadMessage` for anything that its operator did not sign, `RunMismatch` for a run that
    needs another version of this program.
    """
    if blob_digest(raw) != digest:
        raise BadMessage(sender, "manifest does not have the digest that was asked for")
    manifest = Manifest.from_bytes(raw, sender=sender, max_bytes=MAX_MANIFEST_BYTES)
    if not manifest.is_authentic:
        raise BadMessage(sender, "manifest is not signed by its operator")
    check_protocol(manifest.protocol, "the run")
    try:
        consistent = manifest.run_config.fingerprint() == manifest.fingerprint
        paths = {str(path) for path in manifest.topology.paths}
    except Exception as error:
        raise BadMessage(sender, "manifest holds no usable run configuration") from error
    levels = len(manifest.topology.levels)
    if (
        not consistent
        or paths != {s.path for s in manifest.shards}
        or levels != len(manifest.starts)
    ):
        raise BadMessage(sender, "manifest contradicts itself")
    return manifest


def check_protocol(theirs: int, who: str) -> None:
    """Raise `RunMismatch` unless `theirs` is the protocol that this program speaks."""
    if theirs == PROTOCOL_VERSION:
        return
    older = "this program is" if theirs > PROTOCOL_VERSION else f"{who} is"
    raise RunMismatch(
        f"{who} speaks protocol {theirs}, this program protocol {PROTOCOL_VERSION}",
        hint=f"{older} the older one: update it to the release that the run was made with",
    )
