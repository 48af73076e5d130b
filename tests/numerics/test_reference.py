from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dipaco.config import OuterConfig, RunConfig, TopologyConfig
from dipaco.dense import evaluate_dense, train_dense
from dipaco.evaluate import total
from dipaco.inner import PathTrainer
from dipaco.preparation import prepare_start
from dipaco.reference import ReferenceResult, train
from dipaco.start import Start


def variant(start: Start, config: RunConfig) -> Start:
    """The same preparation under another configuration; finished stages are kept."""
    return prepare_start(config, start.directory)


@pytest.fixture(scope="module")
def result(start: Start, tmp_path_factory: pytest.TempPathFactory) -> ReferenceResult:
    return train(start, tmp_path_factory.mktemp("result"), num_rounds=3)


def test_two_runs_end_with_the_same_bytes_and_learn(
    start: Start, result: ReferenceResult, tmp_path: Path
) -> None:
    assert train(start, tmp_path, num_rounds=3).digests == result.digests
    assert total(result.at_end).perplexity < total(result.at_start).perplexity
    assert len(set(result.digests.values())) == len(start.topology.modules)


@pytest.mark.parametrize("wire_format", ["float16", "int8"])
def test_compression_changes_bits_but_hardly_the_result(
    start: Start, result: ReferenceResult, wire_format: str, tmp_path: Path
) -> None:
    outer = replace(start.config.outer, wire_format=wire_format)
    compressed = train(variant(start, replace(start.config, outer=outer)), tmp_path, num_rounds=3)
    assert compressed.digests != result.digests
    assert total(compressed.at_end).perplexity == pytest.approx(
        total(result.at_end).perplexity, rel=0.02
    )


def test_one_path_is_diloco(start: Start, tmp_path: Path) -> None:
    """One path of one peer: inner AdamW, then Nesterov on the whole network, written out."""
    config = replace(start.config, topology=TopologyConfig(levels=(1,)))
    single = prepare_start(config, tmp_path / "single")
    (path,) = single.topology.paths
    trainer = PathTrainer(config, single.topology, path, single.shard(path))
    modules = trainer.modules
    theta = {module: single.module_state(module).parameters for module in modules}
    parameters = {module: torch.nn.Parameter(vector.clone()) for module, vector in theta.items()}
    sgd = torch.optim.SGD(parameters.values(), lr=0.7, momentum=0.9, nesterov=True)
    for round_ in range(2):
        for module, parameter in parameters.items():
            trainer.write_module(module, parameter.detach())
        for step in range(config.rounds.inner_steps):
            trainer.train_step(round_ * config.rounds.inner_steps + step)
        for module, parameter in parameters.items():
            parameter.grad = parameter.detach() - trainer.read_module(module)
        sgd.step()
    states = train(single, tmp_path / "trained", num_rounds=2).states
    for module, parameter in parameters.items():
        assert torch.allclose(states[module].parameters, parameter.detach(), atol=1e-5)


def test_one_inner_step_with_plain_outer_steps_is_averaging(start: Start, tmp_path: Path) -> None:
    """inner_steps = 1, lr = 1, no momentum: each module is the weighted mean over its paths."""
    config = replace(
        start.config,
        outer=OuterConfig(learning_rate=1.0, momentum=0.0, rescale="none", wire_format="float32"),
        rounds=replace(start.config.rounds, inner_steps=1, num_rounds=1),
    )
    plain = variant(start, config)
    topology = plain.topology
    trained = {}
    for path in topology.paths:
        trainer = PathTrainer(config, topology, path, plain.shard(path))
        for module in trainer.modules:
            trainer.write_module(module, plain.module_state(module).parameters)
        trainer.train_step(0)
        trained[path] = {module: trainer.read_module(module) for module in trainer.modules}
    states = train(plain, tmp_path, num_rounds=1).states
    for module, state in states.items():
        paths = topology.paths_through(module)
        tokens = torch.tensor([plain.shard_tokens[path] for path in paths], dtype=torch.float32)
        vectors = torch.stack([trained[path][module] for path in paths])
        mean = (tokens / tokens.sum()) @ vectors
        assert torch.allclose(state.parameters, mean, atol=1e-5)


def test_path_specific_modules_take_outer_steps_too(start: Start, tmp_path: Path) -> None:
    topology = TopologyConfig(levels=(2,), path_specific_blocks=(1,), path_specific_embedding=True)
    private = prepare_start(replace(start.config, topology=topology), tmp_path / "private")
    result = train(private, tmp_path / "trained", num_rounds=1)
    assert len(result.states) == 2 + 2 + 2
    assert all(state.momentum.any() for state in result.states.values())


def test_the_dense_model_is_scored_on_the_same_tokens(
    start: Start, result: ReferenceResult
) -> None:
    dense = evaluate_dense(start.sharding, train_dense(start, 12))
    assert total(dense).num_tokens == total(result.at_start).num_tokens
    assert total(dense).perplexity < total(result.at_start).perplexity
    untrained = evaluate_dense(start.sharding, train_dense(start, 0))
    assert total(untrained).nll_sum == pytest.approx(total(result.at_start).nll_sum, rel=1e-6)
