"""The next manifest's data, made from a real preparation, is what peers follow."""

from dataclasses import replace
from pathlib import Path

import torch

from bootstrap.corpus import PreparedCorpus
from bootstrap.node import load_blobs
from bootstrap.prepare import START_DIR, prepare_run
from dipaco.config import RunConfig
from dipaco.shards import Shard
from peer.manifest import BlobRef, Manifest, Origin
from peer.store import BlobStore
from peer.succession import ManifestDraft, check_successor, grown, successor
from tests.little_run import sign_run


def assert_followed(old: Manifest, draft: ManifestDraft, store: BlobStore) -> Manifest:
    """The draft makes a manifest that may follow, and all that it names is there."""
    sizes = {module: old.starts[module.level].num_bytes for module in old.topology.modules}
    newest = {
        module: Origin(version=3, state=BlobRef(digest="c" * 64, num_bytes=size))
        for module, size in sizes.items()
    }
    unsigned = successor(old, draft, first_slot=old.first_slot + 1, newest=newest)
    new = unsigned.model_copy(update={"peer": old.peer})
    check_successor(new, old, sender="x")
    model = draft.config.model
    for ref in new.shards:
        file = store.intact_file(ref.blob.digest)
        assert file is not None
        shard = Shard.load(
            file,
            path=new.topology.paths[0],
            sequence_tokens=model.sequence_tokens,
            vocab_size=model.vocab_size,
        )
        assert shard.num_tokens(model.pad_token) == ref.tokens
    assert new.router.digest in store
    return new


def test_a_run_is_sharded_by_scores_and_then_grows(tiny: RunConfig, tmp_path: Path) -> None:
    routing = replace(tiny.routing, method="discriminative", router_fraction=0.2, phases=(1,))
    start = prepare_run(replace(tiny, routing=routing), tmp_path, lambda stage, done, total: None)
    first = sign_run(tmp_path, start, start_time=0.0)
    store = BlobStore(tmp_path / "blobs")
    load_blobs(store, start, tmp_path)
    assert {ref.digest for ref in first.data} <= set(store.digests())

    corpus = PreparedCorpus(start, tmp_path, store)
    rows = start.rows("router")
    scores = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(0)) - 100
    second = assert_followed(first, corpus.reshard(first, scores), store)
    assert second.num_phases == 1
    assert second.router != first.router

    dense = (tmp_path / START_DIR / "dense.safetensors").stat()
    draft = corpus.grow(second, grown(second.run_config, (2, 3)))
    third = assert_followed(second, draft, store)
    assert third.topology.num_paths == 6
    assert (tmp_path / "version-3" / "dense.safetensors").stat().st_ino == dense.st_ino, "kept"
    assert start.shard_tokens == {path: first.shard_tokens[path] for path in first.topology.paths}
