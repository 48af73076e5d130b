"""From a run configuration to a signed manifest.

The directory of a run holds `start/` (what `dipaco.start` makes, stage by stage, resumable), the
operator's `identity`, and, once it is served for the first time, `manifest.json`. The manifest is
signed at that moment, because only then is it known when slot 0 begins.
"""

from pathlib import Path

import torch

from dht.identity import Identity
from dipaco.checkpoint import write_atomically
from dipaco.config import RunConfig
from dipaco.digest import blob_digest
from dipaco.errors import ConfigError
from dipaco.preparation import Progress, prepare_start
from dipaco.start import Start
from peer.manifest import BlobRef, Manifest, ShardRef, parse_manifest
from peer.messages import PROTOCOL_VERSION, sign

START_DIR = "start"
IDENTITY_FILE = "identity"
MANIFEST_FILE = "manifest.json"


def prepare_run(
    config: RunConfig, directory: Path, progress: Progress, *, device: torch.device | str = "cpu"
) -> Start:
    """Do what is not done yet; raises `ConfigError` if the run was already served differently."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest_file = directory / MANIFEST_FILE
    if manifest_file.exists():
        served = _read_manifest(manifest_file)
        if served.fingerprint != config.fingerprint():
            raise ConfigError(
                f"`{directory}` holds run {served.name}, which was already served",
                hint="prepare another configuration in another directory",
            )
    Identity.load_or_create(directory / IDENTITY_FILE)
    return prepare_start(config, directory / START_DIR, progress, device=device)


def load_or_sign_manifest(directory: Path, start: Start, *, start_time: float) -> Manifest:
    """The run's manifest; signed now, with slot 0 at `start_time`, if it never was."""
    file = directory / MANIFEST_FILE
    if file.exists():
        return _read_manifest(file)
    identity = Identity.load_or_create(directory / IDENTITY_FILE)
    manifest = sign(_describe(start, operator=identity.peer_id, start_time=start_time), identity)
    write_atomically(file, manifest.to_bytes())
    return manifest


def _describe(start: Start, *, operator: str, start_time: float) -> Manifest:
    """The manifest of a prepared run, not signed yet."""
    topology = start.topology
    return Manifest(
        peer=operator,
        protocol=PROTOCOL_VERSION,
        name=start.config.name,
        version=1,
        start_time=start_time,
        fingerprint=start.config.fingerprint(),
        config=start.config.to_dict(),
        tokenizer=_ref(start, start.tokenizer_file),
        router=_ref(start, start.router_file),
        shards=tuple(
            ShardRef(
                path=str(path),
                blob=_ref(start, start.shard_file(path)),
                tokens=start.shard_tokens[path],
            )
            for path in topology.paths
        ),
        starts=tuple(_ref(start, start.state_file(level.index)) for level in topology.levels),
    )


def _ref(start: Start, file: Path) -> BlobRef:
    index = start.index(file)
    return BlobRef(digest=index.digest, num_bytes=index.size)


def _read_manifest(file: Path) -> Manifest:
    raw = file.read_bytes()
    return parse_manifest(raw, digest=blob_digest(raw), sender="disk")
