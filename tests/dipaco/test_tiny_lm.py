# ruff: noqa: N806 - arrays carry their shape in their name
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipaco.config import RunConfig
from dipaco.errors import BadBytes
from dipaco.routing import router_from_bytes
from dipaco.shards import Rows
from dipaco.tiny_lm import TinyLMRouter, balanced_assignment, train_tiny_lm_router

NUM_KINDS = 4


def no_features(prefixes: Rows) -> torch.Tensor:
    raise AssertionError("tiny language models need no features")


def text_rows(num_rows: int, seed: int) -> Rows:
    """Rows of `NUM_KINDS` kinds in turn, each with some tokens of its own."""
    generator = np.random.default_rng(seed)
    own = 10 + 20 * (np.arange(num_rows) % NUM_KINDS)[:, None]
    is_own = generator.random((num_rows, 64)) < 0.6
    rows = np.where(is_own, own, 100) + generator.integers(0, 12, (num_rows, 64))
    return rows.astype(np.uint16)


@pytest.fixture(scope="module")
def config(tiny: RunConfig) -> RunConfig:
    routing = replace(
        tiny.routing,
        method="tiny_lm",
        prefix_tokens=12,
        lm_width=16,
        lm_blocks=1,
        lm_steps=12,
        lm_phases=4,
    )
    return replace(tiny, routing=routing)


@pytest.fixture(scope="module")
def router(config: RunConfig) -> TinyLMRouter:
    return train_tiny_lm_router(text_rows(1200, 0), config, on_progress=lambda done, total: None)


def test_it_tells_kinds_of_text_apart(config: RunConfig, router: TinyLMRouter) -> None:
    prefixes = text_rows(200, 1)[:, : config.routing.prefix_tokens]
    scores_NP = router.scores(prefixes, no_features)
    assert scores_NP.shape == (200, config.topology.num_paths)
    assert scores_NP.dtype == torch.float32
    chosen = scores_NP.argmax(dim=1).numpy()
    kinds = np.arange(200) % NUM_KINDS
    largest = [np.bincount(kinds[chosen == path], minlength=1).max() for path in range(NUM_KINDS)]
    assert sum(largest) / 200 > 0.7
    # The same whoever asks, however many at once.
    assert torch.allclose(router.scores(prefixes[:3], no_features), scores_NP[:3], rtol=1e-5)


def test_scores_are_log_likelihoods(config: RunConfig, router: TinyLMRouter) -> None:
    row = text_rows(1, 2)[:, : config.routing.prefix_tokens]
    expected = 0.0
    tokens = [config.model.end_token, *(int(token) for token in row[0])]
    with torch.no_grad():
        for number in range(1, len(tokens)):
            logits = router.nets[2](torch.tensor([tokens[:number]]))[0, -1]
            expected += logits.log_softmax(dim=0)[tokens[number]].item()
    assert router.scores(row, no_features)[0, 2].item() == pytest.approx(expected, rel=1e-4)


def test_training_follows_from_the_seed(config: RunConfig) -> None:
    done = []

    def train(seed: int) -> bytes:
        short = replace(config, seed=seed, routing=replace(config.routing, lm_steps=2, lm_phases=2))
        return train_tiny_lm_router(
            text_rows(64, 0), short, on_progress=lambda *progress: done.append(progress)
        ).to_bytes()

    assert train(3) == train(3)
    assert done == 2 * [(number, 8) for number in range(1, 9)]
    assert train(4) != train(3)


def test_bytes_hold_the_router_and_other_bytes_are_refused(
    config: RunConfig, router: TinyLMRouter
) -> None:
    raw = router.to_bytes()
    prefixes = text_rows(9, 3)[:, : config.routing.prefix_tokens]
    again = router_from_bytes(raw, config)
    assert again.to_bytes() == raw
    assert torch.equal(again.scores(prefixes, no_features), router.scores(prefixes, no_features))
    wider = replace(config, routing=replace(config.routing, lm_width=32))
    fewer = replace(config, topology=replace(config.topology, levels=(3,)))
    for wrong, of in ((b"", config), (raw[:-1], config), (raw, wider), (raw, fewer)):
        with pytest.raises(BadBytes):
            TinyLMRouter.from_bytes(wrong, of)
    with pytest.raises(BadBytes, match="finite"):
        TinyLMRouter.from_bytes(raw[:-4] + b"\xff" * 4, config)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 99))
def test_shares_are_equal_and_nobody_misses_a_path_with_room(
    num_rows: int, num_paths: int, seed: int
) -> None:
    scores_NP = -torch.rand(num_rows, num_paths, generator=torch.Generator().manual_seed(seed))
    assigned_N = balanced_assignment(scores_NP)
    shares = np.bincount(assigned_N, minlength=num_paths)
    capacity = -(-num_rows // num_paths)
    assert shares.sum() == num_rows
    assert len(shares) == num_paths
    assert shares.max() <= capacity
    best_N = scores_NP.argmax(dim=1).numpy()
    assert (shares[best_N[assigned_N != best_N]] == capacity).all()


def test_equal_shares_are_much_better_than_random_ones() -> None:
    scores_NP = -torch.rand(400, 4, generator=torch.Generator().manual_seed(0))
    reached = scores_NP[torch.arange(400), torch.from_numpy(balanced_assignment(scores_NP))]
    assert reached.mean() > scores_NP.mean() + 0.2


def test_whoever_scores_best_chooses_first() -> None:
    scores_NP = torch.tensor([[-1.0, -3.0], [-2.0, -9.0], [-5.0, -6.0], [-4.0, -4.5]])
    assert balanced_assignment(scores_NP).tolist() == [0, 0, 1, 1]
