import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipaco.checkpoint import ModuleState
from dipaco.config import OuterConfig, Rescale
from dipaco.gradient import TensorGradient, exact_norm
from dipaco.outer import (
    apply_contributions,
    as_float32,
    average,
    contribution_weights,
    rescale_factor,
    warm_up,
)
from dipaco.topology import PathID

RESCALES: tuple[Rescale, ...] = get_args(Rescale)
PATHS = [PathID((i,)) for i in range(4)]


def vectors(num: int, size: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    return [torch.randn(size, generator=generator) for _ in range(num)]


def test_outer_step_is_torch_sgd_with_nesterov() -> None:
    start, *gradients = vectors(6)
    config = OuterConfig(learning_rate=0.7, momentum=0.9)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    state = ModuleState.initial(start)
    for gradient in gradients:
        state = apply_contributions(state, [(1.0, gradient)], 1, config).state
        parameter.grad = gradient.clone()
        sgd.step()
        assert torch.allclose(state.parameters, parameter.detach(), rtol=1e-5, atol=1e-6)
        buffer = sgd.state[parameter]["momentum_buffer"]
        assert torch.allclose(state.momentum, buffer, rtol=1e-5, atol=1e-6)


def test_every_operation_is_rounded_once() -> None:
    """The closed form, one NumPy float32 operation at a time, gives the same bits."""
    parameters, momentum, gradient = (v.numpy() for v in vectors(3))
    lr, mu = (torch.tensor(value).numpy() for value in (0.7, 0.9))
    expected_momentum = momentum * mu + gradient
    expected = parameters - (expected_momentum * mu + gradient) * lr
    state = ModuleState(
        parameters=torch.from_numpy(parameters), momentum=torch.from_numpy(momentum)
    )
    contributions = [(1.0, torch.from_numpy(gradient))]
    after = apply_contributions(state, contributions, 1, OuterConfig()).state
    assert (after.momentum.numpy() == expected_momentum).all()
    assert (after.parameters.numpy() == expected).all()
    assert (state.parameters.numpy() == parameters).all()


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    parameters, *gradients = vectors(5, size=300_001)
    weighted = list(zip([0.1, 0.2, 0.3, 0.4], gradients, strict=True))
    for rescale in RESCALES:
        config = OuterConfig(rescale=rescale)
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            update = apply_contributions(ModuleState.initial(parameters), weighted, 4, config)
            results.append(update.state.parameters)
        torch.set_num_threads(1)
        assert torch.equal(*results)


def test_plain_averaging_is_a_special_case() -> None:
    """lr = 1 and no momentum: the new parameters are the mean of the paths'."""
    old, *new = vectors(5)
    config = OuterConfig(learning_rate=1.0, momentum=0.0, rescale="none")
    contributions = [(0.25, old - parameters) for parameters in new]
    state = apply_contributions(ModuleState.initial(old), contributions, 4, config).state
    assert torch.allclose(state.parameters, torch.stack(new).mean(0), atol=1e-6)


def test_averaging_some_of_a_path_first_changes_nothing_but_rounding() -> None:
    """Five peers on two paths, three of one of them merged into one contribution."""
    gradients = vectors(5)
    who = [(PATHS[0], 7), (PATHS[0], 30), (PATHS[0], 10), (PATHS[0], 5), (PATHS[1], 9)]
    shards = {PATHS[0]: 100, PATHS[1]: 300}
    zeros, config = ModuleState.initial(torch.zeros(1000)), OuterConfig(clip_norm=0.0)
    weights = contribution_weights(who, shards)
    direct = apply_contributions(zeros, zip(weights, gradients, strict=True), 2, config)
    three = [(tokens / 47, g) for (_, tokens), g in zip(who[:3], gradients[:3], strict=True)]
    merged = average(three, clip_norm=config.clip_norm)
    weights = contribution_weights([(PATHS[0], 47), *who[3:]], shards)
    left = zip(weights, [merged, *gradients[3:]], strict=True)
    update = apply_contributions(zeros, left, 2, config)
    assert torch.allclose(update.state.parameters, direct.state.parameters, atol=1e-6)


def test_an_average_is_clipped_like_an_outer_step() -> None:
    units = list(torch.eye(3))
    weighted = [(1 / 3, units[0]), (1 / 3, units[1]), (1 / 3, 300 * units[2])]
    assert torch.allclose(average(weighted, clip_norm=3.0), torch.tensor([1.0, 1, 3]) / 3)
    with pytest.raises(ValueError, match="length"):
        average([(0.5, units[0]), (0.5, torch.zeros(4))], clip_norm=3.0)


def test_rescaling_multiplies_the_average_by_the_root_of_the_number_of_paths() -> None:
    (gradient,) = vectors(1)
    config = OuterConfig(learning_rate=1.0, momentum=0.0)
    zeros = ModuleState.initial(torch.zeros(1000))
    state = apply_contributions(zeros, [(0.5, gradient), (0.5, gradient)], 9, config).state
    assert torch.allclose(state.parameters, -3 * gradient)
    assert rescale_factor("sqrt", 1) == rescale_factor("none", 9) == 1.0


def test_rda_averages_norms_and_directions_apart() -> None:
    """Two orthogonal gradients of lengths 1 and 3: half way between them, of length 2."""
    config = OuterConfig(learning_rate=1.0, momentum=0.0, rescale="rda")
    zeros = ModuleState.initial(torch.zeros(4))
    first, second = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 3.0, 0, 0])
    update = apply_contributions(zeros, [(0.5, first), (0.5, second)], 2, config)
    assert torch.allclose(-update.state.parameters, torch.tensor([1.0, 1, 0, 0]) * 2**0.5)
    still = apply_contributions(zeros, [(1.0, torch.zeros(4))], 1, config)
    assert not still.state.parameters.any()
    opposed = apply_contributions(zeros, [(0.5, first), (0.5, -first)], 2, config)
    assert not opposed.state.parameters.any()


@pytest.mark.parametrize("rescale", RESCALES)
def test_the_norm_ratio_tells_how_much_gradients_agree(rescale: Rescale) -> None:
    config = OuterConfig(rescale=rescale)
    units = list(torch.eye(4))
    zeros = ModuleState.initial(torch.zeros(4))
    alike = apply_contributions(zeros, [(0.25, units[0])] * 4, 4, config)
    apart = apply_contributions(zeros, [(0.25, unit) for unit in units], 4, config)
    assert alike.norm_ratio == pytest.approx(1.0)
    assert apart.norm_ratio == pytest.approx(0.5)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
def test_the_exact_norm_is_the_norm(values: list[float]) -> None:
    expected = math.sqrt(math.fsum(value * value for value in values))
    assert exact_norm(TensorGradient(torch.tensor(values, dtype=torch.float32))) == pytest.approx(
        expected
    )


def test_the_outer_learning_rate_may_depend_on_the_number_of_paths() -> None:
    config = OuterConfig(learning_rate=0.5, learning_rate_by_paths=((4.0, 0.8), (2.0, 0.6)))
    rates = [config.of_module(num_paths).learning_rate for num_paths in (1, 2, 3, 4, 16)]
    assert rates == [0.5, 0.6, 0.6, 0.8, 0.8]
    warm_up(config)
    with pytest.raises(AssertionError, match="the module's own settings"):
        apply_contributions(ModuleState.initial(torch.zeros(4)), [(1.0, torch.ones(4))], 1, config)


def test_weights_follow_the_shards_and_peers_of_one_path_split_theirs() -> None:
    shard_tokens = dict(zip(PATHS, [100, 300, 600, 5000], strict=True))
    weights = contribution_weights(
        [(PATHS[0], 7), (PATHS[1], 30), (PATHS[1], 10), (PATHS[2], 1)], shard_tokens
    )
    assert weights == pytest.approx([0.1, 0.225, 0.075, 0.6])
    with pytest.raises(ValueError, match="no tokens"):
        contribution_weights([(PATHS[0], 0)], shard_tokens)
    with pytest.raises(ValueError, match="no shard"):
        contribution_weights([(PathID((9,)), 1)], shard_tokens)


@given(
    st.lists(st.tuples(st.sampled_from(PATHS), st.integers(1, 10**12)), min_size=1, max_size=16),
    st.lists(st.integers(1, 10**12), min_size=4, max_size=4),
)
def test_weights_sum_to_one_and_are_float32(
    trained: list[tuple[PathID, int]], shard_sizes: list[int]
) -> None:
    weights = contribution_weights(trained, dict(zip(PATHS, shard_sizes, strict=True)))
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    assert all(weight == as_float32(weight) >= 0 for weight in weights)


def test_what_does_not_fit_is_refused() -> None:
    state = ModuleState.initial(torch.zeros(3))
    for contributions in ([], [(1.0, torch.zeros(4))], [(1.0, torch.zeros(3, dtype=torch.int32))]):
        with pytest.raises(ValueError, match=r"reduce|length|float32"):
            apply_contributions(state, contributions, 1, OuterConfig())
