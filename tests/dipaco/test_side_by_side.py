from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dipaco.config import RunConfig
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.shards import Shard
from dipaco.side_by_side import SideBySide
from dipaco.topology import Topology


def some_trainers(config: RunConfig) -> list[PathTrainer]:
    """One for each of three paths, with its own data and parameters; the last has trained alone."""
    topology = Topology.of(config)
    trainers = []
    for number, path in enumerate(topology.paths[:3]):
        rows = np.random.default_rng(number).integers(2, 384, (10, config.model.sequence_tokens))
        rows[::2, -5 * number - 1 :] = config.model.pad_token
        shard = Shard(path=path, train=rows.astype(np.uint16), valid=rows.astype(np.uint16))
        net = PathNet(config.model)
        initialize(net, number)
        trainer = PathTrainer(config, topology, path, shard)
        for module in trainer.modules:
            trainer.write_module(module, read_module(net, topology, module))
        trainers.append(trainer)
    for step in range(3):
        trainers[-1].train_step(step)
    return trainers


def assert_alike(ours: PathTrainer, theirs: PathTrainer) -> None:
    for module in ours.modules:
        assert torch.allclose(ours.read_module(module), theirs.read_module(module), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_paths_train_side_by_side_as_they_do_alone(tiny: RunConfig, tied: bool) -> None:
    config = replace(tiny, model=replace(tiny.model, tied_embedding=tied))
    together, alone = some_trainers(config), some_trainers(config)
    side_by_side = SideBySide(together)
    for step in range(3, 6):
        losses = side_by_side.train_step(step)
        assert torch.allclose(losses, torch.stack([t.train_step(step) for t in alone]), atol=1e-5)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.num_steps == theirs.num_steps
        assert_alike(ours, theirs)
    # Each goes on alone, with what its optimizer has gathered.
    ours, theirs = together[-1], alone[-1]
    assert ours.evaluate(4).nll_sum == pytest.approx(theirs.evaluate(4).nll_sum, rel=1e-5)
    for trainer in (ours, theirs):
        trainer.train_step(6)
    assert_alike(ours, theirs)
    # And what is written to a trainer is what trains next.
    halved = {module: 0.5 * alone[0].read_module(module) for module in alone[0].modules}
    for trainer in (together[0], alone[0]):
        for module, vector in halved.items():
            trainer.write_module(module, vector)
    losses = side_by_side.train_step(6)
    assert torch.isclose(losses[0], alone[0].train_step(6), atol=1e-5)


def test_there_are_never_the_logits_of_several_paths(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def logits(net: PathNet, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden.flatten(0, -2)))
        return in_full(net, hidden)

    in_full = PathNet.logits
    monkeypatch.setattr(PathNet, "logits", logits)
    SideBySide(some_trainers(tiny)).train_step(0)
    assert 0 < max(sizes) <= tiny.inner.batch_sequences * tiny.model.sequence_tokens


def test_trainers_of_different_runs_are_refused(tiny: RunConfig) -> None:
    others = some_trainers(replace(tiny, seed=7))
    with pytest.raises(ValueError, match="one run"):
        SideBySide([*some_trainers(tiny), *others])
