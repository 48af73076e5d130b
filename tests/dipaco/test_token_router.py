# ruff: noqa: N803, N806 - arrays carry their shape in their name
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dipaco.config import RunConfig
from dipaco.errors import BadBytes, ConfigError
from dipaco.evaluate import IGNORED
from dipaco.model import PathNet, initialize
from dipaco.shards import Rows
from dipaco.token_router import BestPaths, Labels, TokenRouter, held_out, train_token_router

PREFIX = 16  # tokens that are not scored
TURN = 24  # from here on, tokens tell which path is best


def router_data(config: RunConfig, num_rows: int, seed: int) -> tuple[Rows, NDArray[np.float32]]:
    """Rows whose tokens are, after the turn, often the one that stands for the best path."""
    generator = np.random.default_rng(seed)
    num_tokens, num_paths = config.model.sequence_tokens, config.topology.num_paths
    rows = generator.integers(10, 40, (num_rows, num_tokens))
    best_N = np.arange(num_rows) % num_paths
    telling = generator.random((num_rows, num_tokens)) < 0.5
    telling[:, :TURN] = False
    rows = np.where(telling, 2 + best_N[:, None], rows).astype(np.uint16)
    scores_NTP = np.full((num_rows, num_tokens, num_paths), -2.0, dtype=np.float32)
    scores_NTP[np.arange(num_rows), :, best_N] = -1.0
    scores_NTP[:, :PREFIX] = 0.0
    return rows, scores_NTP


def best_paths(scores_NTP: NDArray[np.float32]) -> Labels:
    """Of scores that come path by path, some rows at a time."""
    num_rows, num_tokens, num_paths = scores_NTP.shape
    best = BestPaths(num_rows, num_tokens)
    for number in range(num_paths):
        for start in range(0, num_rows, 5):
            part = slice(start, start + 5)
            best.add(number, part, scores_NTP[part, :, number])
    return best.labels()


@pytest.fixture(scope="module")
def config(tiny: RunConfig) -> RunConfig:
    return replace(tiny, inner=replace(tiny.inner, batch_sequences=16, learning_rate=1e-2))


@pytest.fixture(scope="module")
def router(config: RunConfig) -> TokenRouter:
    net = PathNet(config.model)
    initialize(net, 0)
    rows, scores_NTP = router_data(config, 240, seed=0)
    return train_token_router(
        net,
        rows,
        best_paths(scores_NTP),
        config=config,
        num_steps=30,
        on_progress=lambda done, total: None,
    )


def test_it_learns_which_path_the_tokens_call_for(config: RunConfig, router: TokenRouter) -> None:
    rows, _ = router_data(config, 80, seed=1)
    best_N = np.arange(80) % config.topology.num_paths
    chosen = router.choose(rows, [TURN, TURN + 16, config.model.sequence_tokens])
    share = (chosen == best_N[:, None]).mean(axis=0)
    assert share[0] < 0.5
    assert share[1] > 0.9
    assert share[2] > 0.9
    assert router.choose(rows, []).shape == (80, 0)
    with pytest.raises(ValueError, match="before"):
        router.choose(rows, [0])


def test_only_the_tokens_before_a_boundary_matter(config: RunConfig, router: TokenRouter) -> None:
    rows, _ = router_data(config, 40, seed=2)
    at = [30, 40, 50]
    chosen = router.choose(rows, at)
    for index, boundary in enumerate(at):
        spoiled = rows.copy()
        spoiled[:, boundary:] = 5
        assert np.array_equal(router.choose(spoiled, at)[:, index], chosen[:, index])
        tokens = [int(token) for token in rows[index, :boundary]]
        assert router.next_path(tokens) == chosen[index, index]
    assert router.next_path([9] * 1000 + tokens[-45:]) == router.next_path([9] * 19 + tokens[-45:])


def test_a_label_is_the_best_path_for_all_that_follows() -> None:
    generator = np.random.default_rng(0)
    scores_NTP = -generator.random((7, 12, 3)).astype(np.float32)
    scores_NTP[:, :4] = 0.0
    scores_NTP[3, 9:] = 0.0
    scores_NTP[5, :, 2] = scores_NTP[5, :, 1]  # of equals the first
    labels_NT = best_paths(scores_NTP)
    assert labels_NT.dtype == np.int32
    for row in range(7):
        for token in range(12):
            later_P = scores_NTP[row, token + 1 :].sum(axis=0)
            expected = int(later_P.argmax()) if later_P.any() else IGNORED
            assert labels_NT[row, token] == expected


def test_a_tenth_is_held_out_and_neighbours_stay_together() -> None:
    for num_rows in (10, 99, 1000, 12_345):
        is_held_out_N = held_out(num_rows)
        assert 0.05 < is_held_out_N.mean() < 0.15
        assert np.diff(is_held_out_N.astype(int)).astype(bool).sum() <= 22


def test_what_does_best_on_held_out_rows_is_kept(config: RunConfig) -> None:
    """Where labels are noise, the first parameters, which prefer no path, are hard to beat."""
    net = PathNet(config.model)
    initialize(net, 0)
    rows, scores_NTP = router_data(config, 40, seed=3)
    noise_NTP = -np.random.default_rng(0).random(scores_NTP.shape).astype(np.float32)
    done = []
    first, second = (
        train_token_router(
            net,
            rows,
            best_paths(noise_NTP),
            config=config,
            num_steps=6,
            on_progress=lambda step, total: done.append((step, total)),
        )
        for _ in range(2)
    )
    assert done == 2 * [(step, 6) for step in range(1, 7)]
    assert first.to_bytes() == second.to_bytes()
    held = held_out(40)
    num_paths = config.topology.num_paths
    assert first.loss(rows[held], best_paths(noise_NTP)[held]) < math.log(num_paths) + 1e-4


def test_bytes_hold_the_router_and_other_bytes_are_refused(
    config: RunConfig, router: TokenRouter
) -> None:
    raw = router.to_bytes()
    again = TokenRouter.from_bytes(raw, config)
    rows, _ = router_data(config, 20, seed=4)
    assert np.array_equal(again.choose(rows, [20, 50]), router.choose(rows, [20, 50]))
    other = replace(config, topology=replace(config.topology, levels=(2, 3)))
    for wrong in (b"", raw[:-1], raw[:-4] + b"\xff" * 4):
        with pytest.raises(BadBytes):
            TokenRouter.from_bytes(wrong, config)
    with pytest.raises(BadBytes):
        TokenRouter.from_bytes(raw, other)


def test_too_little_router_data_is_a_config_error(config: RunConfig) -> None:
    rows, scores_NTP = router_data(config, 9, seed=0)
    with pytest.raises(ConfigError, match="9 sequences"):
        train_token_router(
            PathNet(config.model),
            rows,
            best_paths(scores_NTP),
            config=config,
            num_steps=1,
            on_progress=lambda done, total: None,
        )
