"""An optimizer's state in 8 bits: what it is good for, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dipaco.config import InnerConfig, RunConfig
from dipaco.errors import BadBytes
from dipaco.inner import PathTrainer
from dipaco.moments import (
    Moments,
    decode_moments,
    encode_moments,
    greatest_ratio,
    moments_bytes,
)
from dipaco.optimizer import saved_moments
from dipaco.tensors import decode_tensors, encode_tensors, layout_of
from tests.dipaco.test_inner import a_trainer

INNER = InnerConfig(batch_sequences=1, learning_rate=0.001, warmup_steps=0)
N = 700


def vectors(trainer: PathTrainer) -> Tensor:
    return torch.cat([trainer.read_module(module) for module in trainer.modules])


def some_moments(config: InnerConfig = INNER, num_steps: int = 30) -> Moments:
    """What clipped gradients of very different sizes leave."""
    generator = torch.Generator().manual_seed(0)
    mean, mean_square = torch.zeros(N), torch.zeros(N)
    sizes = torch.logspace(-3, 0, N)
    for _ in range(num_steps):
        gradient = torch.randn(N, generator=generator) * sizes
        gradient *= config.gradient_clip_norm / gradient.norm()
        mean = config.beta1 * mean + (1 - config.beta1) * gradient
        mean_square = config.beta2 * mean_square + (1 - config.beta2) * gradient**2
    return Moments(num_steps=num_steps, mean=mean, mean_square=mean_square)


def test_another_peer_goes_on_where_the_first_one_was(tiny: RunConfig, tmp_path: Path) -> None:
    first = a_trainer(tiny)
    for step in range(20):
        first.train_step(step)
    file = tmp_path / "path.optimizer"
    first.save_optimizer(file)
    saved = saved_moments(file)
    assert saved is not None
    num_parameters = len(vectors(first))
    raw = encode_moments(saved)
    assert len(raw) == moments_bytes(num_parameters) < 2.1 * num_parameters
    moments = decode_moments(raw, num_parameters=num_parameters, config=tiny.inner)

    moved = []
    for takes_over in (True, False):
        second = a_trainer(tiny)
        for module in second.modules:
            second.write_module(module, first.read_module(module))
        before = vectors(second)
        if takes_over:
            second.take_over(moments)
        assert second.num_steps == (20 if takes_over else 0)
        second.num_steps = 20  # no warm-up, for the sake of the comparison
        second.seek(20)  # the same rows
        second.train_step(20)
        moved.append(vectors(second) - before)
    before = vectors(first)
    first.train_step(20)
    step = vectors(first) - before
    assert (moved[0] - step).norm() < 0.05 * step.norm()
    assert (moved[1] - step).norm() > 0.5 * step.norm(), "a new optimizer takes another step"


def test_no_file_and_other_files_are_no_state(tiny: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "path.optimizer"
    assert saved_moments(file) is None
    for raw in (b"", b"garbage", encode_tensors({"identity": torch.zeros(3)})):
        file.write_bytes(raw)
        assert saved_moments(file) is None
    trainer = a_trainer(tiny)
    trainer.train_step(0)
    trainer.save_optimizer(file)
    file.write_bytes(file.read_bytes().replace(b"adamw 0", b"adamv 0"))
    assert saved_moments(file) is None


@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99), (0.99, 0.9)])
def test_what_gradients_leave_is_taken(betas: tuple[float, float], clip_norm: float) -> None:
    config = replace(INNER, beta1=betas[0], beta2=betas[1], gradient_clip_norm=clip_norm)
    moments = some_moments(config)
    decoded = decode_moments(encode_moments(moments), num_parameters=N, config=config)
    assert decoded.num_steps == moments.num_steps
    assert (decoded.mean - moments.mean).norm() < 0.02 * moments.mean.norm()
    ratio = (decoded.mean_square / moments.mean_square).sqrt()
    assert 0.7 < ratio.min() <= ratio.max() < 1.4


def test_the_greatest_ratio_is_that_of_the_gradients_that_reach_it() -> None:
    # Equality in the inequality: gradients in proportion to how much more the mean remembers.
    ages = torch.arange(2000, dtype=torch.float64)
    gradients = (INNER.beta1 / INNER.beta2) ** ages
    mean = (1 - INNER.beta1) * (INNER.beta1**ages * gradients).sum()
    mean_square = (1 - INNER.beta2) * (INNER.beta2**ages * gradients**2).sum()
    assert greatest_ratio(INNER) == pytest.approx(float(mean / mean_square.sqrt()))


Change = Callable[[dict[str, Tensor]], None]


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["mean.scales"][1] = math.nan


def with_infinity(tensors: dict[str, Tensor]) -> None:
    tensors["root.scales"][0] = math.inf


def with_a_negative_root(tensors: dict[str, Tensor]) -> None:
    tensors["root.scales"][0] *= -1


def with_no_step(tensors: dict[str, Tensor]) -> None:
    tensors["num_steps"].fill_(0)


def with_more_steps_than_anyone_takes(tensors: dict[str, Tensor]) -> None:
    tensors["num_steps"].fill_(2**60)


def with_squares_that_would_take_ages_to_forget(tensors: dict[str, Tensor]) -> None:
    tensors["root.scales"] *= 10


def with_another_name(tensors: dict[str, Tensor]) -> None:
    tensors["means"] = tensors.pop("num_steps")


@pytest.mark.parametrize(
    "change",
    [
        with_nan,
        with_infinity,
        with_a_negative_root,
        with_no_step,
        with_more_steps_than_anyone_takes,
        with_squares_that_would_take_ages_to_forget,
        with_another_name,
    ],
)
def test_what_no_peer_would_send_is_refused(change: Change) -> None:
    raw = encode_moments(some_moments())
    tensors = decode_tensors(raw, layout_of(raw))
    change(tensors)
    with pytest.raises(BadBytes, match="not an optimizer's state"):
        decode_moments(encode_tensors(tensors), num_parameters=N, config=INNER)


@pytest.mark.parametrize("num_parameters", [N - 1, N + 1, 0])
def test_the_state_of_another_path_is_refused(num_parameters: int) -> None:
    raw = encode_moments(some_moments())
    with pytest.raises(BadBytes, match="bytes, expected"):
        decode_moments(raw, num_parameters=num_parameters, config=INNER)


def test_a_mean_that_no_gradients_have_is_cut_so_that_steps_stay_bounded() -> None:
    raw = encode_moments(some_moments())
    tensors = decode_tensors(raw, layout_of(raw))
    tensors["mean.scales"] *= 1e6
    tensors["root.scales"][1] = 0.0
    moments = decode_moments(encode_tensors(tensors), num_parameters=N, config=INNER)
    root = moments.mean_square.sqrt()
    assert bool((moments.mean.abs() <= 1.001 * greatest_ratio(INNER) * root).all())
    assert not moments.mean[256:512].any(), "nothing is divided by zero"


def test_what_has_diverged_is_not_given_away() -> None:
    moments = some_moments()
    moments.mean[3] = math.nan
    with pytest.raises(BadBytes, match="not finite"):
        encode_moments(moments)
