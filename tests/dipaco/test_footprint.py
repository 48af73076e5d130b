from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dipaco.config import RunConfig
from dipaco.footprint import choose_optimizer, least_training_bytes, training_bytes
from dipaco.model import PathNet, initialize


def test_the_optimizer_is_the_one_that_fits(tiny: RunConfig) -> None:
    assert choose_optimizer(tiny, 10**9, None).name == "adamw"
    assert choose_optimizer(tiny, 10**9, 20 * 2**30).name == "adamw"
    short = choose_optimizer(tiny, 10**9, 12 * 2**30)
    assert short.name == "adamw8bit"
    assert "14.9 GiB needed, 12.0 GiB free" in short.reason
    assert "even for 8-bit" in choose_optimizer(tiny, 10**9, 6 * 2**30).reason


def test_what_a_batch_takes_is_counted_not_only_parameters(tiny: RunConfig) -> None:
    """A path of little size and long sequences: its activations are what fills a small GPU."""
    long = replace(tiny, inner=replace(tiny.inner, batch_sequences=10_000))
    assert least_training_bytes(long, 10**5) > 100 * least_training_bytes(tiny, 10**5)
    assert choose_optimizer(long, 10**5, 2**30).name == "adamw8bit"


def test_the_estimate_is_near_what_autograd_saves(tiny: RunConfig) -> None:
    model = replace(
        tiny.model,
        width=128,
        num_heads=4,
        num_kv_heads=2,
        head_width=32,
        ffn_width=352,
        num_blocks=4,
    )
    config = replace(tiny, model=model, inner=replace(tiny.inner, batch_sequences=32))
    net = PathNet(model)
    initialize(net, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net.hidden(torch.zeros(32, model.sequence_tokens, dtype=torch.int64))
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    estimate = training_bytes(config, 0, "cpu", "adamw")
    assert 0.8 * estimate < num_bytes < estimate
