"""The corpus of a prepared run, given to the paths anew: the slow part of a next manifest.

Each version of the manifest has its own directory in that of the run, `version-2` and so on, and
what it names is in the store of the operator's node before it is signed.
"""

# ruff: noqa: N803 - arrays carry their shape in their name: N rows, P paths

import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dipaco.checkpoint import link_or_copy
from dipaco.config import RunConfig
from dipaco.preparation import prepare_start
from dipaco.sharding import Sharding, reshard_corpus
from dipaco.start import Start
from peer.manifest import BlobRef, Manifest, ShardRef
from peer.store import BlobStore
from peer.succession import ManifestDraft


class PreparedCorpus:
    """The sequences of a `Start`, and the dense start by which routers see them."""

    def __init__(self, start: Start, directory: Path, store: BlobStore) -> None:
        self._start = start
        self._directory = directory
        self._store = store

    def reshard(self, manifest: Manifest, scores_NP: Tensor) -> ManifestDraft:
        """Give each sequence to the path that probably predicts it best (paper 2.4.2)."""
        config = manifest.run_config
        directory = self._version_directory(manifest)
        sharding = reshard_corpus(self._start, config, scores_NP, directory)
        return self._draft(sharding, config, num_phases=manifest.num_phases + 1)

    def grow(self, manifest: Manifest, config: RunConfig) -> ManifestDraft:
        """Give the sequences to the paths of `config`, by the router that such a run begins with.

        What a preparation does before it comes to paths is taken over from the start.
        """
        directory = self._version_directory(manifest)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self._start.directory, directory, copy_function=link_or_copy)
        # The settings of the start, so that nothing but the paths has changed.
        start = prepare_start(replace(self._start.config, topology=config.topology), directory)
        return self._draft(start.sharding, config, num_phases=manifest.num_phases)

    def _version_directory(self, manifest: Manifest) -> Path:
        return self._directory / f"version-{manifest.version + 1}"

    def _draft(self, sharding: Sharding, config: RunConfig, *, num_phases: int) -> ManifestDraft:
        return ManifestDraft(
            config=config,
            router=self._add(sharding.router_file),
            shards=tuple(
                ShardRef(
                    path=str(path), blob=self._add(sharding.shard_file(path)), tokens=num_tokens
                )
                for path, num_tokens in sharding.shard_tokens.items()
            ),
            num_phases=num_phases,
        )

    def _add(self, file: Path) -> BlobRef:
        digest = self._store.add_file(file)
        index = self._store.index(digest)
        assert index is not None, "it was added just now"
        return BlobRef(digest=digest, num_bytes=index.size)
