"""The signed description of a run: everything that the swarm must agree on, and nothing else.

The operator's key signs it once; then any peer can hand it to a newcomer, because its digest
names the run and the signature inside proves who made it. A volunteer's own choices (device, disk,
bandwidth) are never in it. Later versions name the one before (`peer.succession`); which of them is
in force in a slot, `peer.history` says.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from dht.errors import BadMessage, RunMismatch
from dht.records import Digest, ModuleText, PathText
from dipaco.config import RunConfig
from dipaco.digest import blob_digest
from dipaco.topology import PathID, Topology
from peer.messages import (
    PROTOCOL_VERSION,
    Message,
    SignedMessage,
    Slot,
    Version,
)

# One shard reference is about 200 bytes; this is room for 64k paths.
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_VERSIONS = 100  # of one run's manifest: what a newcomer may have to fetch


class BlobRef(Message):
    """Names a blob and its size in bytes."""

    digest: Digest
    num_bytes: Annotated[int, Field(ge=1, le=2**45)]


class ShardRef(Message):
    """The shard of one path."""

    path: PathText
    blob: BlobRef
    tokens: Annotated[int, Field(ge=1, le=2**53)]  # training tokens: the path's weight


class Birth(Message):
    """A module that a version of the manifest adds: it begins as a certified version of another."""

    module: ModuleText
    source: ModuleText
    version: Version  # of the source, and the one at which the new module's log begins
    state: BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a module's log begins: a version and a state that the operator's signature vouches for.

    Version 0 and a start state, or what a module that was added later was born from.
    """

    version: int
    state: BlobRef


class Manifest(SignedMessage):
    """One version of a run's description; `peer` is the operator."""

    protocol: Annotated[int, Field(ge=0, le=2**31)]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    version: Annotated[int, Field(ge=1, le=MAX_VERSIONS)]
    predecessor: Digest | None = None  # the version before; None for the first, which names the run
    first_slot: Slot = 0  # from whose start it is in force
    num_phases: Annotated[int, Field(ge=0, le=MAX_VERSIONS)] = 0  # of routing.phases, behind it
    start_time: Annotated[
        float, Field(ge=0, le=1e11, allow_inf_nan=False)
    ]  # of slot 0, Unix seconds
    fingerprint: Digest  # of the run configuration
    config: dict[str, Any]
    tokenizer: BlobRef
    router: BlobRef
    router_data: BlobRef | None = None  # rows that no path trains on, in the form of a shard
    shards: Annotated[tuple[ShardRef, ...], Field(min_length=1, max_length=2**16)]
    starts: Annotated[tuple[BlobRef, ...], Field(min_length=1, max_length=2**10)]  # state per level
    births: Annotated[tuple[Birth, ...], Field(max_length=2**16)] = ()  # of this version's modules

    @cached_property
    def digest(self) -> str:
        """Its name as a blob."""
        return blob_digest(self.to_bytes())

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

    @property
    def phase_round(self) -> int | None:
        """After how many rounds the corpus is sharded anew next; None if it will not be."""
        phases = self.run_config.routing.phases
        return phases[self.num_phases] if self.num_phases < len(phases) else None

    def shard(self, path: PathID) -> ShardRef:
        """The shard reference of `path`."""
        return self._shard_by_name[str(path)]

    @cached_property
    def _shard_by_name(self) -> dict[str, ShardRef]:
        return {shard.path: shard for shard in self.shards}

    @property
    def origins(self) -> tuple[BlobRef, ...]:
        """The states that this version vouches for."""
        return (*self.starts, *(birth.state for birth in self.births))

    @property
    def data(self) -> tuple[BlobRef, ...]:
        """The blobs that training under this version needs, besides states."""
        router_data = () if self.router_data is None else (self.router_data,)
        return (self.tokenizer, self.router, *router_data, *(s.blob for s in self.shards))

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
    if manifest.digest != digest:  # or anyone could make many of one
        raise BadMessage(sender, "manifest is not in canonical form")
    if not manifest.is_authentic:
        raise BadMessage(sender, "manifest is not signed by its operator")
    check_protocol(manifest.protocol, "the run")
    try:
        consistent = manifest.run_config.fingerprint() == manifest.fingerprint
        paths = {str(path) for path in manifest.topology.paths}
    except Exception as error:
        raise BadMessage(sender, "manifest holds no usable run configuration") from error
    follows_nothing = manifest.predecessor is None and not (
        manifest.first_slot or manifest.num_phases or manifest.births
    )
    if (
        not consistent
        or paths != {s.path for s in manifest.shards}
        or len(manifest.topology.levels) != len(manifest.starts)
        or follows_nothing != (manifest.version == 1)
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
