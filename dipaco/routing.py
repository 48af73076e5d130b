"""Which path a sequence takes, decided from its first tokens (paper 2.4).

Every router gives each path a score, higher is better; the best one is taken. Most of them see a
*feature* of the prefix: the mean of the last block's hidden states of the frozen dense start
(paper 7.2.1). Features are centered and scaled to length 1, so that their direction decides:
without that, k-means spends centers on the few sequences with long features, and shards come out
uneven.

- `CenterRouter`: the nearest k-means center (paper 2.4.1); or one center per level, each seeing
  its own part of the feature, so that the expert of each level is chosen on its own (product
  k-means, paper 7.3). The paper takes the first and the second half of the columns. These are
  correlated, so that most pairs of centers hardly occur: here the parts are made of principal
  components in turn, which are not.
- `LinearRouter`: a classifier that learned which path predicts best (`dipaco.discriminative`).
- `TinyLMRouter` (`dipaco.tiny_lm`): the tiny language model that predicts the prefix best.
- `HashRouter`: the control, which knows nothing.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their name: N sequences, T tokens,
# D width, P paths, K centers

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dipaco.config import RunConfig
from dipaco.errors import BadBytes, ConfigError
from dipaco.shards import Rows
from dipaco.tensors import Layout, decode_tensors, encode_tensors, layout_of

if TYPE_CHECKING:
    from dipaco.model import PathNet

MAX_FIT_SEQUENCES = 2**16  # more do not move a center; the whole corpus would not fit in memory
_FEATURE_BATCH = 256  # sequences in one pass; only their prefixes are read
# Sequences scored at a time: whole passes, so that features have the bits of those of all at once.
ROUTE_BATCH = 4 * _FEATURE_BATCH
_NUM_TRIALS = 4  # k-means from this many starts, the best kept

FeatureExtractor = Callable[[Rows], Tensor]
"""The feature [N, D] of each prefix, float32 on the CPU."""


class Router(Protocol):
    """Scores every path for a sequence, from its prefix."""

    def scores(self, prefixes_NT: Rows, features: FeatureExtractor) -> Tensor:
        """Scores [N, P], float32, higher is better; calls `features` only if it needs them."""
        ...

    def to_bytes(self) -> bytes:
        """The router as safetensors."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CenterRouter:
    """Mean [D] of the features, a rotation [D, D] of them, and the centers [K, D/G] of G groups.

    One group has a center per path. Several groups have one per expert of their level.
    """

    mean_D: Tensor
    rotation_DD: Tensor
    centers: tuple[Tensor, ...]

    def scores(self, prefixes_NT: Rows, features: FeatureExtractor) -> Tensor:
        """Negative squared distances, added up over the groups."""
        features_ND = features(prefixes_NT)
        sizes = [centers_KD.shape[1] for centers_KD in self.centers]
        scores_NP = torch.zeros(len(features_ND), 1, dtype=torch.float64)
        rotated_ND = (features_ND - self.mean_D) @ self.rotation_DD
        for part_ND, centers_KD in zip(
            torch.split(rotated_ND, sizes, dim=1), self.centers, strict=True
        ):
            directions_ND = F.normalize(part_ND, dim=1).double()
            costs_NK = torch.cdist(directions_ND, centers_KD.double()).square()
            scores_NP = (scores_NP[:, :, None] - costs_NK[:, None, :]).flatten(1)
        return scores_NP.float()

    def to_bytes(self) -> bytes:
        """The router as safetensors."""
        groups = {f"centers.{number}": centers for number, centers in enumerate(self.centers)}
        return encode_tensors({"mean": self.mean_D, "rotation": self.rotation_DD, **groups})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearRouter:
    """Logits of standardized features: mean [D], scale [D], weight [P, D], bias [P]."""

    mean_D: Tensor
    scale_D: Tensor
    weight_PD: Tensor
    bias_P: Tensor

    def scores(self, prefixes_NT: Rows, features: FeatureExtractor) -> Tensor:
        """The logits of the paths."""
        features_ND = (features(prefixes_NT) - self.mean_D) / self.scale_D
        logits_NP = features_ND.double() @ self.weight_PD.double().T + self.bias_P.double()
        return logits_NP.float()

    def to_bytes(self) -> bytes:
        """The router as safetensors."""
        return encode_tensors(
            {
                "mean": self.mean_D,
                "scale": self.scale_D,
                "weight": self.weight_PD,
                "bias": self.bias_P,
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HashRouter:
    """A path by the SHA-256 of the prefix: what routing is worth is measured against this."""

    num_paths: int

    def scores(self, prefixes_NT: Rows, features: FeatureExtractor) -> Tensor:
        """0 for the path of the hash, -1 for the next one, and so on."""
        del features
        raw = np.ascontiguousarray(prefixes_NT)
        digests = (hashlib.sha256(row.tobytes()).digest() for row in raw)
        first_N = torch.tensor([int.from_bytes(d[:8], "big") % self.num_paths for d in digests])
        return -((torch.arange(self.num_paths) - first_N[:, None]) % self.num_paths).float()

    def to_bytes(self) -> bytes:
        """The number of paths, as safetensors."""
        return encode_tensors({"num_paths": torch.tensor([self.num_paths])})


def router_from_bytes(raw: bytes | memoryview, config: RunConfig) -> Router:
    """The inverse of `to_bytes` for any router of this run; BadBytes if it is none."""
    try:
        names = set(layout_of(raw))
        if any(name.startswith("lm.") for name in names):
            from dipaco.tiny_lm import TinyLMRouter

            return TinyLMRouter.from_bytes(raw, config)
        tensors = decode_tensors(raw, _layout(names, config))
    except ValueError as error:
        raise BadBytes(f"not the router of this run: {error}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise BadBytes("not the router of this run: a value is not finite")
    return _of_tensors(tensors, config)


def _layout(names: set[str], config: RunConfig) -> Layout:
    width, num_paths = config.model.width, config.topology.num_paths
    if "num_paths" in names:
        return {"num_paths": (torch.int64, (1,))}
    feature = (torch.float32, (width,))
    if "weight" in names:
        return {
            "mean": feature,
            "scale": feature,
            "weight": (torch.float32, (num_paths, width)),
            "bias": (torch.float32, (num_paths,)),
        }
    groups = config.topology.levels if "centers.1" in names else (num_paths,)
    shapes = zip(groups, part_widths(width, len(groups)), strict=True)
    return {
        "mean": feature,
        "rotation": (torch.float32, (width, width)),
        **{f"centers.{number}": (torch.float32, shape) for number, shape in enumerate(shapes)},
    }


def _of_tensors(tensors: dict[str, Tensor], config: RunConfig) -> Router:
    if "num_paths" in tensors:
        if int(tensors["num_paths"]) != config.topology.num_paths:
            raise BadBytes("not the router of this run: it has another number of paths")
        return HashRouter(num_paths=config.topology.num_paths)
    if "weight" in tensors:
        return LinearRouter(
            mean_D=tensors["mean"],
            scale_D=tensors["scale"],
            weight_PD=tensors["weight"],
            bias_P=tensors["bias"],
        )
    centers = tuple(tensors[f"centers.{number}"] for number in range(len(tensors) - 2))
    return CenterRouter(mean_D=tensors["mean"], rotation_DD=tensors["rotation"], centers=centers)


def part_widths(width: int, num_groups: int) -> list[int]:
    """`width` columns cut into `num_groups` parts as even as possible, the wider ones first."""
    size, num_wider = divmod(width, num_groups)
    return [size + (group < num_wider) for group in range(num_groups)]


def ranking(
    router: Router, rows: Rows, features: FeatureExtractor, *, prefix_tokens: int, num_best: int
) -> NDArray[np.int64]:
    """The numbers [N, num_best] of the best paths of each row, the best one first."""
    scores_NP = router.scores(rows[:, :prefix_tokens], features)
    best: NDArray[np.int64] = scores_NP.topk(num_best, dim=1).indices.numpy()
    return best


def feature_extractor(net: "PathNet") -> FeatureExtractor:
    """Features of prefixes by the dense start: means of the last block's hidden states."""
    device = net.model.embed_tokens.weight.device

    @torch.no_grad()
    def extract(prefixes_NT: Rows) -> Tensor:
        parts = []
        for start in range(0, len(prefixes_NT), _FEATURE_BATCH):
            tokens = torch.from_numpy(prefixes_NT[start : start + _FEATURE_BATCH].astype(np.int64))
            hidden_BTD = net.hidden(tokens.to(device))
            parts.append(hidden_BTD.mean(dim=1).float().cpu())
        return torch.cat(parts)

    return extract


def fit_centers(features_ND: Tensor, num_centers: Sequence[int], seed: int) -> CenterRouter:
    """k-means in each of `len(num_centers)` groups of principal components of the features.

    ConfigError if there are fewer sequences than centers in a group, or fewer features than groups.
    """
    if len(features_ND) < max(num_centers):
        raise ConfigError(
            f"{len(features_ND)} sequences are too few for {max(num_centers)} centers",
            hint="raise corpus.max_documents, or take fewer paths",
        )
    num_groups = len(num_centers)
    if features_ND.shape[1] < num_groups:
        raise ConfigError(
            f"model.width is {features_ND.shape[1]}, too little to route {num_groups} levels by",
            hint="raise it, or take fewer topology.levels or another routing.method",
        )
    mean_D = features_ND.mean(dim=0)
    rotation_DD = _components(features_ND - mean_D)
    # In turn, so that every group has its share of the large ones.
    rotation_DD = torch.cat([rotation_DD[:, group::num_groups] for group in range(num_groups)], 1)
    sizes = part_widths(features_ND.shape[1], num_groups)
    parts = torch.split((features_ND - mean_D) @ rotation_DD, sizes, dim=1)
    centers = (
        _kmeans(F.normalize(part_ND, dim=1), number, seed)
        for part_ND, number in zip(parts, num_centers, strict=True)
    )
    return CenterRouter(mean_D=mean_D, rotation_DD=rotation_DD, centers=tuple(centers))


def _components(centered_ND: Tensor) -> Tensor:
    """The principal components, as the columns of a rotation [D, D], the largest first."""
    covariance_DD = centered_ND.double().T @ centered_ND.double() / len(centered_ND)
    ascending_DD: Tensor = torch.linalg.eigh(covariance_DD).eigenvectors
    return ascending_DD.flip(1).float().contiguous()


def _kmeans(directions_ND: Tensor, num_centers: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    kmeans = KMeans(num_centers, n_init=_NUM_TRIALS, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct sequences than centers: some path is nobody's best, which sharding handles.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans.fit(directions_ND.numpy())
    return torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))
