"""From a run configuration to a signed manifest.

The directory of a run holds `start/` (what `dipaco.start` makes, stage by stage, resumable), the
operator's `identity`, and, once it is served for the first time, `manifest.json`. The manifest is
signed at that moment, because only then is it known when slot 0 begins.
"""

from pathlib import Path

import numpy as np
import torch

from dht.errors import BadMessage, LocalFault
from dht.identity import Identity
from dipaco.checkpoint import write_atomically
from dipaco.config import RunConfig
from dipaco.digest import blob_digest
from dipaco.errors import ConfigError
from dipaco.preparation import Progress, check_sources, prepare_start
from dipaco.shards import write_shard
from dipaco.start import Start
from peer.history import History
from peer.manifest import BlobRef, Manifest, ShardRef, parse_manifest
from peer.messages import PROTOCOL_VERSION, sign
from peer.session import run_directory
from peer.store import BlobStore

START_DIR = "start"
IDENTITY_FILE = "identity"
MANIFEST_FILE = "manifest.json"
ROUTER_DATA_FILE = "router-data.safetensors"


def prepare_run(
    config: RunConfig, directory: Path, progress: Progress, *, device: torch.device | str = "cpu"
) -> Start:
    """Do what is not done yet; raises `ConfigError` if the run was already served differently."""
    directory.mkdir(parents=True, exist_ok=True)
    served = served_manifest(directory)
    if served is not None and served.fingerprint != config.fingerprint():
        raise ConfigError(
            f"`{directory}` holds run {served.name}, which was already served",
            hint="prepare another configuration in another directory",
        )
    Identity.load_or_create(directory / IDENTITY_FILE)
    check_sources(config, directory / START_DIR)
    return prepare_start(config, directory / START_DIR, progress, device=device)


def served_manifest(directory: Path) -> Manifest | None:
    """The first manifest of a run that was served; None if it never was.

    Raises `ConfigError` if it is damaged, `LocalFault` if the key that signed it is not here.
    """
    file = directory / MANIFEST_FILE
    if not file.exists():
        return None
    raw = file.read_bytes()
    try:
        manifest = parse_manifest(raw, digest=blob_digest(raw), sender=str(file))
    except BadMessage as error:
        raise ConfigError(
            f"`{file}` is damaged: {error.why}",
            hint="restore your copy; `runs/RUN/blobs` has another, whose name begins with RUN",
        ) from error
    key_file = directory / IDENTITY_FILE
    if not key_file.exists() or Identity.load_or_create(key_file).peer_id != manifest.peer:
        raise LocalFault(
            f"`{key_file}` is not the key that signed run {manifest.name}",
            hint="restore your copy of it; volunteers train on without this node",
        )
    return manifest


def newest_manifest(directory: Path) -> Manifest:
    """The newest version of a run that was served; ConfigError if it never was."""
    first = served_manifest(directory)
    if first is None:
        raise ConfigError(
            f"the run in `{directory}` was never served",
            hint="set topology.levels in its configuration, and prepare it again",
        )
    run_dir = run_directory(directory, first.digest)
    return History(first, BlobStore(run_dir / "blobs"), run_dir / "manifests").newest


def describe(start: Start, directory: Path, *, operator: str) -> Manifest:
    """The manifest of a run that was never served, to be signed; reads every file that it names."""
    router_data = None
    if start.config.routing.phases:
        router_data = _ref(start, _write_router_data(start, directory))
    topology = start.topology
    return Manifest(
        peer=operator,
        protocol=PROTOCOL_VERSION,
        name=start.config.name,
        version=1,
        start_time=0.0,  # not known yet
        fingerprint=start.config.fingerprint(),
        config=start.config.to_dict(),
        tokenizer=_ref(start, start.tokenizer_file),
        router=_ref(start, start.router_file),
        router_data=router_data,
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


def sign_manifest(
    described: Manifest, directory: Path, identity: Identity, *, start_time: float
) -> Manifest:
    """Sign the run's first manifest, with slot 0 at `start_time`: from now on it was served.

    Raises `ConfigError` if it was served before: its peers are in the run of that manifest.
    """
    file = directory / MANIFEST_FILE
    if file.exists():
        raise ConfigError(f"`{file}` is there already", hint="start the same command again")
    manifest = sign(described.model_copy(update={"start_time": start_time}), identity)
    write_atomically(file, manifest.to_bytes())
    return manifest


def _write_router_data(start: Start, directory: Path) -> Path:
    """The rows that no path trains on, as a shard without validation rows."""
    rows = start.router_data()
    file = directory / ROUTER_DATA_FILE
    write_shard(file, train=(rows, np.arange(len(rows))), valid=(rows, np.arange(0)))
    return file


def _ref(start: Start, file: Path) -> BlobRef:
    index = start.index(file)
    return BlobRef(digest=index.digest, num_bytes=index.size)
