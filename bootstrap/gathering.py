"""Gathering the scores of a discriminative phase: bytes of strangers, until they are checked.

A path's only peer can bias the router by lying, and nobody can tell. Where several peers train a
path, the median of what they say counts.
"""

import asyncio
import hashlib

import torch
from torch import Tensor

from dht.errors import BadBlob, PeerFault, Unreachable
from dht.keys import scores_key
from dht.records import Scores
from dipaco.discriminative import decode_scores, encode_scores
from dipaco.errors import BadBytes
from dipaco.shards import Shard
from dipaco.topology import PathID
from peer.manifest import Manifest
from peer.node import Node

MAX_SCORERS = 8  # of one path
MAX_PULLS = 8  # at once
SCORES_TIMEOUT_SECONDS = 60.0


class Gathering:
    """What the peers of every path say about the router data."""

    def __init__(self, node: Node, manifest: Manifest, num_rows: int) -> None:
        self.manifest = manifest
        self._node = node
        self._num_rows = num_rows
        self._num_bytes = len(encode_scores(torch.zeros(num_rows)))
        self._scores: dict[PathID, dict[str, Tensor]] = {p: {} for p in manifest.topology.paths}
        self._bad: set[tuple[str, str]] = set()  # peer and blob
        self._pulls = asyncio.Semaphore(MAX_PULLS)

    @classmethod
    async def begin(cls, node: Node, manifest: Manifest) -> "Gathering":
        """Nothing gathered yet; `Unreachable` if the router data is not in the store."""
        return cls(node, manifest, await node.offload(lambda: _num_rows(node, manifest)))

    @property
    def missing(self) -> list[PathID]:
        """The paths that nobody has scored so far."""
        return [path for path, by_peer in self._scores.items() if not by_peer]

    def scores(self) -> Tensor:
        """Scores [N, P] by row and path; once none is missing."""
        medians = [
            torch.stack(list(by_peer.values())).median(dim=0).values
            for by_peer in self._scores.values()
        ]
        return torch.stack(medians, dim=1)

    async def look(self) -> None:
        """Take in what is new."""
        await asyncio.gather(*(self._look_at(path) for path in self._scores))

    async def _look_at(self, path: PathID) -> None:
        known, slot = self._scores[path], self._node.slot
        records = [
            record
            for record in await self._node.swarm.read(scores_key(self._node.run, str(path)))
            if isinstance(record, Scores)
            and record.phase == self.manifest.num_phases
            and record.peer not in known
            and (record.peer, record.blob) not in self._bad
        ]
        # In another order in each slot, so that many who never answer do not hide the others.
        records.sort(key=lambda r: hashlib.sha256(f"{slot}|{r.peer}".encode()).digest())
        for record in records[: MAX_SCORERS - len(known)]:
            async with self._pulls:
                await self._take(path, record)

    async def _take(self, path: PathID, record: Scores) -> None:
        node = self._node
        try:
            await node.blobs.fetch(
                record.blob,
                [record.peer],
                max_bytes=self._num_bytes,
                timeout_seconds=SCORES_TIMEOUT_SECONDS,
            )
            index = node.store.index(record.blob)
            if index is None or index.size != self._num_bytes:  # it may be any blob that is here
                raise BadBlob(record.peer, "not scores of the router data")
            raw = node.store.read(record.blob) or b""
            self._scores[path][record.peer] = decode_scores(raw, self._num_rows)
        except BadBytes as error:
            self._refuse(record, BadBlob(record.peer, str(error)))
        except PeerFault as error:
            self._refuse(record, error)
        except Unreachable as error:
            node.faults.count(error, record.peer)

    def _refuse(self, record: Scores, error: PeerFault) -> None:
        self._bad.add((record.peer, record.blob))
        self._node.faults.count(error, record.peer)


def _num_rows(node: Node, manifest: Manifest) -> int:
    ref, model = manifest.router_data, manifest.run_config.model
    file = node.store.intact_file(ref.digest) if ref is not None else None
    if file is None:
        raise Unreachable("the router data is not on disk")
    shard = Shard.load(
        file,
        path=manifest.topology.path_at(0),
        sequence_tokens=model.sequence_tokens,
        vocab_size=model.vocab_size,
    )
    return len(shard.train)
