"""Which path a sequence takes: k-means on features of its first tokens (paper 2.4.1, 7.2.1).

The feature of a sequence is the mean of the last block's hidden states of the frozen dense
start over the prefix. Features are centered and scaled to length 1, so that their direction
decides: without that, k-means spends centers on the few sequences with long features, and shards
come out uneven. The nearest of k centers is the path.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their name: N sequences, D width, K centers

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dipaco.errors import BadBytes
from dipaco.shards import Rows
from dipaco.tensors import Layout, decode_tensors, encode_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dipaco.model import PathNet

_FEATURE_BATCH = 256  # sequences at a time; only their prefixes are read
_NUM_TRIALS = 4  # k-means from this many starts, the best kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Router:
    """Mean [D] of the features, and the centers [K, D] of the paths; float32."""

    mean_D: Tensor
    centers_KD: Tensor

    def assign(self, features_ND: Tensor) -> "NDArray[np.int64]":
        """The path number of each sequence."""
        directions_ND = F.normalize(features_ND - self.mean_D, dim=1)
        distances_NK = torch.cdist(directions_ND.double(), self.centers_KD.double())
        numbers: NDArray[np.int64] = distances_NK.argmin(dim=1).numpy()
        return numbers

    def to_bytes(self) -> bytes:
        """The router as safetensors."""
        return encode_tensors({"mean": self.mean_D, "centers": self.centers_KD})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview, *, num_paths: int, width: int) -> "Router":
        """The inverse of `to_bytes`; BadBytes if it is not a router of these dimensions."""
        layout: Layout = {
            "mean": (torch.float32, (width,)),
            "centers": (torch.float32, (num_paths, width)),
        }
        try:
            tensors = decode_tensors(raw, layout)
        except ValueError as error:
            raise BadBytes(f"not the router of this run: {error}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise BadBytes("not the router of this run: a value is not finite")
        return cls(mean_D=tensors["mean"], centers_KD=tensors["centers"])


@torch.no_grad()
def features(
    net: "PathNet",
    rows: Rows,
    *,
    prefix_tokens: int,
    on_progress: "Callable[[int], None]" = lambda num_done: None,
) -> Tensor:
    """The feature [N, D] of each row, float32 on the CPU."""
    device = net.model.embed_tokens.weight.device
    parts = []
    for start in range(0, len(rows), _FEATURE_BATCH):
        tokens = rows[start : start + _FEATURE_BATCH, :prefix_tokens].astype(np.int64)
        parts.append(net.hidden(torch.from_numpy(tokens).to(device)).mean(dim=1).float().cpu())
        on_progress(start + len(tokens))
    return torch.cat(parts)


def fit_router(features_ND: Tensor, num_paths: int, seed: int) -> Router:
    """k-means with one center per path."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    mean_D = features_ND.mean(dim=0)
    directions_ND = F.normalize(features_ND - mean_D, dim=1)
    kmeans = KMeans(num_paths, n_init=_NUM_TRIALS, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct sequences than paths: shows as an empty shard, which has its own error.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans.fit(directions_ND.numpy())
    centers_KD = torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))
    return Router(mean_D=mean_D, centers_KD=centers_KD)
