# ruff: noqa: N802, N803, N806 - arrays carry their shape in their name

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dipaco.config import RunConfig, TopologyConfig
from dipaco.discriminative import (
    calibrated_bias,
    decode_scores,
    encode_scores,
    fit_linear_router,
    target_shares,
)
from dipaco.errors import BadBytes, ConfigError
from dipaco.routing import HashRouter, Router, fit_centers, router_from_bytes
from dipaco.shards import Rows

WIDTH = 32


def blobs(num_kinds: int, num_rows: int = 240) -> tuple[Tensor, Tensor]:
    """Features [N, D] around `num_kinds` centers, and the kind of each."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(num_kinds, WIDTH, generator=generator)
    kinds = torch.arange(num_rows) % num_kinds
    return centers[kinds] + 0.1 * torch.randn(num_rows, WIDTH, generator=generator), kinds


def prefixes_of(features_ND: Tensor) -> tuple[Rows, Callable[[Rows], Tensor]]:
    """Prefixes that are only numbers of rows, and the extractor that looks these rows up."""
    numbers = np.arange(len(features_ND), dtype=np.uint16)[:, None]
    return numbers, lambda rows: features_ND[torch.from_numpy(rows[:, 0].astype(np.int64))]


def best(router: Router, features_ND: Tensor) -> Tensor:
    return router.scores(*prefixes_of(features_ND)).argmax(dim=1)


def pairs(*columns: Tensor) -> set[tuple[int, ...]]:
    return {tuple(map(int, row)) for row in zip(*columns, strict=True)}


def test_k_means_finds_what_is_apart() -> None:
    features_ND, kinds = blobs(3)
    router = fit_centers(features_ND, [3], seed=0)
    assert len(pairs(kinds, best(router, features_ND))) == 3


def test_fewer_sequences_or_features_than_needed_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="3 sequences are too few for 4 centers"):
        fit_centers(blobs(3, num_rows=3)[0], [4], seed=0)
    with pytest.raises(ConfigError, match="too little to route 9 levels"):
        fit_centers(torch.rand(10, 8), [1] * 9, seed=0)


def test_product_k_means_chooses_the_expert_of_each_level_on_its_own() -> None:
    """Four kinds along two directions that have nothing to do with each other: four paths.

    A correlated copy of the first direction must not get the second level.
    """
    first, second = (torch.arange(400) % 2) * 2.0 - 1, (torch.arange(400) // 2 % 2) * 2.0 - 1
    noise = 0.05 * torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0))
    axes = torch.eye(WIDTH)
    features_ND = 3 * first[:, None] * (axes[0] + axes[WIDTH - 1]) + 2 * second[:, None] * axes[1]
    router = fit_centers(features_ND + noise, [2, 2], seed=0)
    chosen = best(router, features_ND)
    assert len(pairs(first, second, chosen)) == 4
    assert len(pairs(first, chosen // 2)) == len(pairs(second, chosen % 2)) == 2


def test_hash_routing_knows_nothing_but_is_even_and_repeatable() -> None:
    rows = np.random.default_rng(0).integers(0, 99, (4000, 8), dtype=np.uint16)
    scores = HashRouter(num_paths=4).scores(rows, lambda rows: torch.empty(0))
    chosen = scores.argmax(dim=1)
    assert torch.equal(chosen, HashRouter(num_paths=4).scores(rows.copy(), NO_FEATURES).argmax(1))
    assert torch.bincount(chosen).min() > 900
    assert pairs(*scores[:9].sort(dim=1).values.T) == {(-3, -2, -1, 0)}


def NO_FEATURES(rows: Rows) -> Tensor:
    raise AssertionError("not needed")


def test_the_linear_router_learns_which_path_is_best() -> None:
    """Path 3 is best for nothing, but still gets its share, so that no shard is empty."""
    features_ND, kinds = blobs(3)
    scores_NP = -torch.rand(len(kinds), 4, generator=torch.Generator().manual_seed(1)) - 1
    scores_NP[torch.arange(len(kinds)), kinds] = 0.0
    router = fit_linear_router(features_ND, scores_NP, seed=0)
    chosen = best(router, features_ND)
    assert (chosen == kinds).float().mean() > 0.9
    assert torch.bincount(chosen, minlength=4).min() > 0


def test_calibration_repairs_what_the_classifier_neglects() -> None:
    """Noise hides a rare label from the classifier; with the bias its share is right again."""
    generator = np.random.default_rng(0)
    logits_NP = generator.normal(size=(4000, 8))
    logits_NP[:, 0] += 4.0
    logits_NP[:, 7] -= 4.0
    target_P = target_shares(np.array([100, 50, 50, 50, 50, 50, 50, 3]))
    shares_P = np.bincount((logits_NP + calibrated_bias(logits_NP, target_P)).argmax(1)) / 4000
    assert np.abs(shares_P - target_P).max() < 0.01
    assert np.bincount(logits_NP.argmax(1), minlength=8)[7] == 0


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any))
def test_target_shares_leave_nobody_out(counts: list[int]) -> None:
    shares_P = target_shares(np.array(counts))
    assert shares_P.sum() == pytest.approx(1.0)
    assert shares_P.min() >= 0.1 / len(counts)


def with_levels(config: RunConfig, *levels: int) -> RunConfig:
    return replace(config, topology=TopologyConfig(levels=levels))


def test_routers_travel_as_bytes(tiny: RunConfig) -> None:
    features_ND, _ = blobs(4)
    config = with_levels(tiny, 2, 2)
    routers: list[Router] = [
        fit_centers(features_ND, [4], seed=0),
        fit_centers(features_ND, [2, 2], seed=0),
        fit_linear_router(features_ND, torch.randn(len(features_ND), 4), seed=0),
        HashRouter(num_paths=4),
    ]
    prefixes, extract = prefixes_of(features_ND)
    for router in routers:
        raw = router.to_bytes()
        copy = router_from_bytes(raw, config)
        assert torch.equal(copy.scores(prefixes, extract), router.scores(prefixes, extract))
        for wrong in (raw[:-1], b"", raw.replace(b"F32", b"I32").replace(b"I64", b"U64")):
            with pytest.raises(BadBytes):
                router_from_bytes(wrong, config)
        with pytest.raises(BadBytes):
            router_from_bytes(raw, with_levels(tiny, 3, 2))


def test_scores_of_router_data_travel_as_bytes() -> None:
    scores_N = torch.randn(5)
    raw = encode_scores(scores_N)
    assert torch.equal(decode_scores(raw, 5), scores_N)
    for wrong in (raw[:-1], encode_scores(torch.tensor([1.0, 2, 3, 4, float("nan")]))):
        with pytest.raises(BadBytes):
            decode_scores(wrong, 5)
    with pytest.raises(BadBytes):
        decode_scores(raw, 6)
