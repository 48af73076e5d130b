"""A run small enough for dozens of peers in one test, of random tokens instead of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bootstrap.prepare import IDENTITY_FILE, describe, sign_manifest
from dht.identity import Identity
from dipaco.checkpoint import ModuleState, encode_state
from dipaco.config import (
    CorpusConfig,
    DenseStartConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RoundsConfig,
    RoutingConfig,
    RunConfig,
    TopologyConfig,
)
from dipaco.digest import blob_digest
from dipaco.model import PathNet, initialize, read_module
from dipaco.shards import Shard
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID, Topology
from peer.manifest import BlobRef, Manifest, ShardRef
from peer.messages import PROTOCOL_VERSION, sign
from peer.store import BlobStore
from peer.succession import ManifestDraft


def little_config(**rounds: Any) -> RunConfig:
    """A 2x2 run small enough for dozens of peers in one test."""
    return RunConfig(
        name="little",
        seed=1,
        model=ModelConfig(
            vocab_size=260,
            width=16,
            num_blocks=2,
            num_heads=2,
            num_kv_heads=1,
            ffn_width=32,
            sequence_tokens=16,
        ),
        topology=TopologyConfig(levels=(2, 2)),
        corpus=CorpusConfig(source="python"),
        dense_start=DenseStartConfig(
            steps=0, learning_rate=0.001, warmup_steps=0, batch_sequences=1
        ),
        routing=RoutingConfig(prefix_tokens=4),
        inner=InnerConfig(batch_sequences=2, learning_rate=0.003, warmup_steps=2),
        outer=OuterConfig(wire_format=rounds.pop("wire_format", "float32")),
        rounds=RoundsConfig(
            **{
                "num_rounds": 4,
                "round_seconds": 20.0,
                "inner_steps": 3,
                "blocking": True,
                "eval_sequences": 2,
                **rounds,
            }
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's blobs and manifest, made of random tokens instead of text."""

    manifest: Manifest
    digest: str
    blobs: list[bytes]
    shards: dict[PathID, Shard]
    starts: dict[ModuleID, ModuleState]


def make_run(config: RunConfig, *, operator: Identity, start_time: float) -> Run:
    topology = Topology.of(config)
    shards = make_shards(config, seed=config.seed)
    net = PathNet(config.model)
    initialize(net, config.seed)
    starts = {m: ModuleState.initial(read_module(net, topology, m)) for m in topology.modules}
    by_level = {module.level: encode_state(state) for module, state in starts.items()}
    raw_shards = [shard.to_bytes() for shard in shards.values()]
    tokenizer, router = b"a tokenizer", b"a router"
    router_data = make_router_data(config).to_bytes() if config.routing.phases else None
    manifest = sign(
        Manifest(
            peer=operator.peer_id,
            protocol=PROTOCOL_VERSION,
            name=config.name,
            version=1,
            start_time=start_time,
            fingerprint=config.fingerprint(),
            config=config.to_dict(),
            tokenizer=_ref(tokenizer),
            router=_ref(router),
            router_data=None if router_data is None else _ref(router_data),
            shards=shard_refs(config, shards),
            starts=tuple(_ref(by_level[level]) for level in sorted(by_level)),
        ),
        operator,
    )
    raw = manifest.to_bytes()
    blobs = [raw, tokenizer, router, *raw_shards, *by_level.values()]
    blobs += [] if router_data is None else [router_data]
    return Run(
        manifest=manifest, digest=blob_digest(raw), blobs=blobs, shards=shards, starts=starts
    )


def run_of(start: Start, directory: Path, *, start_time: float) -> Run:
    """A run of real text, signed by an operator whose key lies in `directory`."""
    manifest = sign_run(directory, start, start_time=start_time)
    topology = start.topology
    files = [start.tokenizer_file, start.router_file]
    files += [start.shard_file(path) for path in topology.paths]
    files += [start.state_file(level.index) for level in topology.levels]
    return Run(
        manifest=manifest,
        digest=manifest.digest,
        blobs=[manifest.to_bytes(), *(file.read_bytes() for file in files)],
        shards={path: start.shard(path) for path in topology.paths},
        starts={module: start.module_state(module) for module in topology.modules},
    )


def sign_run(directory: Path, start: Start, *, start_time: float) -> Manifest:
    """What serving a run for the first time leaves in `directory`."""
    operator = Identity.load_or_create(directory / IDENTITY_FILE)
    described = describe(start, directory, operator=operator.peer_id)
    return sign_manifest(described, directory, operator, start_time=start_time)


def make_shards(config: RunConfig, *, seed: int) -> dict[PathID, Shard]:
    """Random rows, as many as chance gives."""
    generator = np.random.default_rng(seed)
    shards = {}
    for path in Topology.of(config).paths:
        rows = [
            generator.integers(2, config.model.vocab_size, (n, config.model.sequence_tokens))
            for n in (generator.integers(12, 24), 4)
        ]
        train, valid = (part.astype(np.uint16) for part in rows)
        shards[path] = Shard(path=path, train=train, valid=valid)
    return shards


def make_router_data(config: RunConfig) -> Shard:
    """Rows that no path trains on."""
    model, path = config.model, Topology.of(config).path_at(0)
    rows = np.random.default_rng(99).integers(2, model.vocab_size, (10, model.sequence_tokens))
    return Shard(path=path, train=rows.astype(np.uint16), valid=np.empty((0, 16), np.uint16))


class LabCorpus:
    """Random rows as the corpus of the operator; remembers by which scores it was sharded."""

    def __init__(self, store: BlobStore) -> None:
        self.scores: list[Tensor] = []
        self._store = store

    def reshard(self, manifest: Manifest, scores: Tensor) -> ManifestDraft:
        self.scores.append(scores)
        return self.draft(manifest, manifest.run_config, num_phases=manifest.num_phases + 1)

    def grow(self, manifest: Manifest, config: RunConfig) -> ManifestDraft:
        return self.draft(manifest, config, num_phases=manifest.num_phases)

    def draft(self, manifest: Manifest, config: RunConfig, *, num_phases: int) -> ManifestDraft:
        shards = make_shards(config, seed=100 + manifest.version)
        router = b"router of version %d" % (manifest.version + 1)
        for raw in (router, *(shard.to_bytes() for shard in shards.values())):
            self._store.add(raw)
        return ManifestDraft(
            config=config,
            router=_ref(router),
            shards=shard_refs(config, shards),
            num_phases=num_phases,
        )


def shard_refs(config: RunConfig, shards: dict[PathID, Shard]) -> tuple[ShardRef, ...]:
    return tuple(
        ShardRef(
            path=str(path),
            blob=_ref(shard.to_bytes()),
            tokens=shard.num_tokens(config.model.pad_token),
        )
        for path, shard in shards.items()
    )


def _ref(raw: bytes) -> BlobRef:
    return BlobRef(digest=blob_digest(raw), num_bytes=len(raw))


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))
