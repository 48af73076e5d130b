"""Shards and router data, which are of one form, out of a peer's store."""

from dipaco.errors import DipacoError
from dipaco.shards import Shard
from dipaco.topology import PathID
from peer.manifest import BlobRef, Manifest
from peer.store import BlobStore


def stored_shard(store: BlobStore, ref: BlobRef, manifest: Manifest, path: PathID) -> Shard | None:
    """The blob as rows that `path` can be trained on or scored with; None if it is not here, or
    damaged.
    """
    file, model = store.intact_file(ref.digest), manifest.run_config.model
    if file is None:
        return None
    try:
        return Shard.load(
            file, path=path, sequence_tokens=model.sequence_tokens, vocab_size=model.vocab_size
        )
    except DipacoError:
        return None
