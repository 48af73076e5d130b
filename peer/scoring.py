"""Scoring router data with the path that is trained, for a discriminative phase (paper 2.4.2).

The operator learns from the scores which path predicts a sequence best, and shards the corpus anew.
Nobody waits for it: some rows are scored between two bursts of training, and a peer that changes
its path goes on where it was when it comes back.
"""

import torch
from torch import Tensor

from dht.errors import LocalFault
from dipaco.discriminative import encode_scores
from dipaco.shards import Rows
from dipaco.topology import PathID
from peer.manifest import Manifest
from peer.node import Node
from peer.path_work import PathWork
from peer.presence import Presence
from peer.stored_shard import stored_shard


class Scoring:
    """Scores each path that this peer trains, once for every phase."""

    def __init__(self, node: Node, presence: Presence) -> None:
        self._node = node
        self._presence = presence
        self._phase = -1  # that the rest is of
        self._rows: Rows | None = None
        self._parts: dict[PathID, list[Tensor]] = {}  # of paths whose scores are not on offer yet
        self._refused_slot = -1  # in which the disk did not take some

    async def step(self, work: PathWork, *, seconds: float, max_batches: int) -> bool:
        """Score some more rows, if the path's scores are due; False if they are not."""
        node, path = self._node, work.trainer.path
        manifest = node.history.newest
        if manifest.num_phases != self._phase:
            await self._begin(manifest.num_phases)
        if manifest.phase_round is None or work.round < manifest.phase_round:
            return False
        if path in self._presence.scores:
            return False
        if self._rows is None:
            self._rows = await node.offload(lambda: self._read_rows(manifest, path))
        if self._rows is None:
            return False
        parts = self._parts.setdefault(path, [])
        rest = self._rows[sum(map(len, parts)) :]
        if len(rest):
            parts.append(
                await node.offload(
                    lambda: work.score(rest, seconds=seconds, max_batches=max_batches)
                )
            )
            if len(parts[-1]) < len(rest):
                return True
        elif node.slot == self._refused_slot:
            return False
        try:
            blob = node.store.add(encode_scores(torch.cat(parts)))
        except (LocalFault, OSError) as error:  # a full disk: tried again in the next slot
            self._refused_slot = node.slot
            node.events.write("error", where="scores", why=str(error))
            return False
        del self._parts[path]
        await self._presence.offer_scores(path, phase=manifest.num_phases, blob=blob)
        node.events.write("scored", path=str(path), phase=manifest.num_phases, blob=blob)
        return True

    async def _begin(self, phase: int) -> None:
        """Take back what was scored for phases that are over."""
        self._phase, self._rows, self._parts = phase, None, {}
        for path, scores in list(self._presence.scores.items()):
            del self._presence.scores[path]
            await self._node.swarm.withdraw(scores)

    def _read_rows(self, manifest: Manifest, path: PathID) -> Rows | None:
        """The router data; None while it is not here."""
        if manifest.router_data is None:
            return None
        rows = stored_shard(self._node.store, manifest.router_data, manifest, path)
        return None if rows is None else rows.train
