"""Scoring router data with the path that is trained, for a discriminative phase (paper 2.4.2).

The operator learns from the scores which path predicts a sequence best, and shards the corpus anew.
Nobody waits for it: rows are scored a batch at a time, between two bursts of training.
"""

import torch
from torch import Tensor

from dht.records import Scores
from dipaco.discriminative import encode_scores
from dipaco.errors import DipacoError
from dipaco.shards import Rows, Shard
from dipaco.topology import PathID
from peer.manifest import Manifest
from peer.node import Node
from peer.path_work import PathWork
from peer.presence import Presence


class Scoring:
    """Scores each path that this peer trains, once for every phase."""

    def __init__(self, node: Node, presence: Presence) -> None:
        self._node = node
        self._presence = presence
        self._begun: tuple[int, PathID] | None = None
        self._rows: Rows | None = None
        self._parts: list[Tensor] = []

    async def step(self, work: PathWork) -> bool:
        """Score one more batch of rows, if the path's scores are due; False if they are not."""
        node, path = self._node, work.trainer.path
        manifest = node.history.newest
        await self._forget_before(manifest.num_phases)
        if manifest.phase_round is None or work.round < manifest.phase_round:
            return False
        if path in self._presence.scores:
            return False
        if self._begun != (manifest.num_phases, path):
            self._rows = await node.offload(lambda: self._read_rows(manifest, path))
            self._begun, self._parts = (manifest.num_phases, path), []
        if self._rows is None:
            self._begun = None
            return False
        first = sum(map(len, self._parts))
        batch = self._rows[first : first + work.trainer.config.inner.batch_sequences]
        self._parts.append(await node.offload(lambda: work.score(batch)))
        if first + len(batch) == len(self._rows):
            blob = node.store.add(encode_scores(torch.cat(self._parts)))
            self._begun, self._rows, self._parts = None, None, []
            await self._presence.offer_scores(path, phase=manifest.num_phases, blob=blob)
            node.events.write("scored", path=str(path), phase=manifest.num_phases, blob=blob)
        return True

    async def _forget_before(self, phase: int) -> None:
        """Take back scores of a phase that is over."""
        over: list[Scores] = [s for s in self._presence.scores.values() if s.phase < phase]
        for scores in over:
            del self._presence.scores[PathID.parse(scores.path)]
            await self._node.swarm.withdraw(scores)

    def _read_rows(self, manifest: Manifest, path: PathID) -> Rows | None:
        """The router data; None while it is not here."""
        ref, model = manifest.router_data, manifest.run_config.model
        file = self._node.store.intact_file(ref.digest) if ref is not None else None
        if file is None:
            return None
        try:
            return Shard.load(
                file, path=path, sequence_tokens=model.sequence_tokens, vocab_size=model.vocab_size
            ).train
        except DipacoError:
            return None
