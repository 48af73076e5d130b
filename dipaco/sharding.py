"""The corpus, given to the paths by a router (paper 2.2): one shard per path, in a directory.

Works through the sequences in batches and keeps a few bytes per sequence, so that memory does not
grow with what a sequence holds.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their name: N sequences,
# D width, P paths, K of them

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipaco.checkpoint import sweep, write_atomically
from dipaco.config import RunConfig
from dipaco.discriminative import fit_linear_router
from dipaco.errors import ConfigError
from dipaco.routing import ROUTE_BATCH, FeatureExtractor, Router, router_from_bytes
from dipaco.shards import Rows, Shard, write_shard
from dipaco.topology import PathID, Topology

if TYPE_CHECKING:
    from dipaco.start import Start

ROUTER_FILE = "router.safetensors"
LISTING_FILE = "shards.json"
_MIN_SEQUENCES = 32  # of a shard; a path that fewer sequences choose trains on those that suit best

OnRows = Callable[[int, int], None]
"""Called with the number of sequences done, and of all."""


@dataclass(frozen=True)
class Sharding:
    """A router and what it gave to each path, in a directory. Files are read when asked for."""

    config: RunConfig
    directory: Path

    @property
    def is_done(self) -> bool:
        """Whether the directory holds it all: the list of shards is written last."""
        return self.listing_file.is_file()

    @property
    def listing_file(self) -> Path:
        """The training tokens of each path."""
        return self.directory / LISTING_FILE

    @cached_property
    def shard_tokens(self) -> dict[PathID, int]:
        """Training tokens of each path: its weight. ConfigError if the directory has none."""
        try:
            listing = json.loads(self.listing_file.read_text())
            return {PathID.parse(path): int(tokens) for path, tokens in listing.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{self.directory} holds no shards", hint="prepare the run again"
            ) from error

    @property
    def router_file(self) -> Path:
        """The router, a blob."""
        return self.directory / ROUTER_FILE

    def shard_file(self, path: PathID) -> Path:
        """The shard of a path, a blob."""
        return self.directory / "shards" / f"{path}.safetensors"

    def router(self) -> Router:
        """The router."""
        return router_from_bytes(self.router_file.read_bytes(), self.config)

    def shard(self, path: PathID) -> Shard:
        """The shard of a path, read from disk as it is used."""
        return Shard.load(
            self.shard_file(path),
            path=path,
            sequence_tokens=self.config.model.sequence_tokens,
            vocab_size=self.config.model.vocab_size,
        )


def shard_corpus(  # noqa: PLR0913 - what to give to whom, then how it is seen
    start: "Start",
    config: RunConfig,
    router: Router,
    directory: Path,
    on_rows: OnRows = lambda done, total: None,
    *,
    features: FeatureExtractor,
    train_features_ND: Tensor | None = None,
) -> Sharding:
    """Give the training rows to their best `routing.overlap` paths, the others to the best.

    `config` is that of the paths, which may be more than those of `start`. Writes the router and
    the shards into `directory`, the list of shards last. `train_features_ND` is what `features`
    gives for all training rows at once, by whoever has that already.
    """
    sharding = Sharding(config, directory)
    topology = Topology.of(config)
    (directory / "shards").mkdir(parents=True, exist_ok=True)
    sweep(directory, directory / "shards")
    sharding.listing_file.unlink(missing_ok=True)
    train_rows, valid_rows = start.rows("train"), start.rows("valid")
    num_train, total = len(train_rows), len(train_rows) + len(valid_rows)
    overlap = min(config.routing.overlap, topology.num_paths)
    route = partial(_members, config, router)
    train = route(
        train_rows,
        _extracted(features) if train_features_ND is None else _known(train_features_ND),
        overlap,
        lambda done: on_rows(done, total),
    )
    valid = route(
        valid_rows, _extracted(features), 1, lambda done: on_rows(num_train + done, total)
    )
    tokens = {}
    for number, path in enumerate(topology.paths):
        # Shuffled, so that the first rows are a fair sample of all.
        generator = np.random.default_rng((config.seed, number))
        write_shard(
            sharding.shard_file(path),
            train=(train_rows, generator.permutation(train.of(number, at_least=_MIN_SEQUENCES))),
            valid=(valid_rows, generator.permutation(valid.of(number, at_least=0))),
        )
        tokens[str(path)] = sharding.shard(path).num_tokens(config.model.pad_token)
    write_atomically(sharding.router_file, router.to_bytes())
    write_atomically(sharding.listing_file, (json.dumps(tokens, indent=1) + "\n").encode())
    return sharding


def reshard_corpus(
    start: "Start",
    config: RunConfig,
    scores_NP: Tensor,
    directory: Path,
    *,
    device: torch.device | str = "cpu",
) -> Sharding:
    """Give each sequence to the paths that probably predict it best, as router data tells.

    `scores_NP` has the log-likelihoods (nats) of `start.router_data()` under every path (paper
    2.4.2). `config` and `directory` as in `shard_corpus`.
    """
    features = start.feature_extractor(device)
    prefixes = start.router_data()[:, : config.routing.prefix_tokens]
    router = fit_linear_router(features(prefixes), scores_NP, config.seed)
    return shard_corpus(start, config, router, directory, features=features)


_RowFeatures = Callable[[slice, Rows], Tensor]
"""The features [n, D] of some rows: which ones they are, and their prefixes."""


def _extracted(features: FeatureExtractor) -> _RowFeatures:
    return lambda part, prefixes: features(prefixes)


def _known(features_ND: Tensor) -> _RowFeatures:
    return lambda part, prefixes: features_ND[part]


@dataclass(frozen=True, slots=True)
class _Members:
    """The rows of each path: those that chose it, and those that suit it best."""

    order: NDArray[np.int64]  # rows, sorted by the path that they chose
    starts: NDArray[np.int64]  # where each path's rows begin in `order`
    best_PK: NDArray[np.int64]

    def of(self, number: int, *, at_least: int) -> NDArray[np.int64]:
        """Rows of a path, ascending; where fewer than `at_least` chose it, its best ones too."""
        chosen = self.order[self.starts[number] : self.starts[number + 1]]
        if len(chosen) < at_least:
            chosen = np.union1d(chosen, self.best_PK[number][: at_least - len(chosen)])
        rows: NDArray[np.int64] = np.sort(chosen)
        return rows


def _members(
    config: RunConfig,
    router: Router,
    rows: Rows,
    features: _RowFeatures,
    num_best: int,
    on_rows: Callable[[int], None],
) -> _Members:
    num_paths = config.topology.num_paths
    chosen_NK = np.empty((len(rows), num_best), dtype=np.int32)
    best_PK = np.empty((num_paths, 0), dtype=np.int64)
    best_scores_PK = np.empty((num_paths, 0), dtype=np.float32)
    for start in range(0, len(rows), ROUTE_BATCH):
        prefixes = np.asarray(rows[start : start + ROUTE_BATCH, : config.routing.prefix_tokens])
        end = start + len(prefixes)
        scores_NP = router.scores(prefixes, partial(features, slice(start, end))).numpy()
        chosen_NK[start:end] = np.argsort(-scores_NP, axis=1, kind="stable")[:, :num_best]
        numbers = np.broadcast_to(np.arange(start, end), (num_paths, len(prefixes)))
        best_PK, best_scores_PK = _best(
            np.concatenate([best_PK, numbers], axis=1),
            np.concatenate([best_scores_PK, scores_NP.T], axis=1),
        )
        on_rows(end)
    flat = chosen_NK.ravel()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(num_paths + 1))
    return _Members(order // num_best, starts, best_PK)


def _best(
    rows_PK: NDArray[np.int64], scores_PK: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each path's candidates, those that suit it best, the best one first."""
    order = np.argsort(-scores_PK, axis=1, kind="stable")[:, :_MIN_SEQUENCES]
    return np.take_along_axis(rows_PK, order, 1), np.take_along_axis(scores_PK, order, 1)
