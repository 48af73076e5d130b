"""Training on a GPU does what it does on a CPU, within bfloat16.

`pytest tests/gpu` on a machine with an NVIDIA GPU; everywhere else they are skipped.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dipaco.config import RunConfig
from dipaco.device import require_compiler
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.optimizer import OptimizerName
from dipaco.shards import Shard
from dipaco.topology import PathID, Topology

NUM_STEPS = 30


@pytest.fixture(scope="module")
def large_enough(tiny: RunConfig) -> RunConfig:
    """Tensors of more than 4096 values, which is where an 8-bit optimizer begins."""
    model = replace(tiny.model, width=128, num_heads=4, num_kv_heads=2, ffn_width=256)
    return replace(tiny, model=model, inner=replace(tiny.inner, warmup_steps=3))


def a_trainer(
    config: RunConfig,
    device: str,
    *,
    path: PathID | None = None,
    optimizer: OptimizerName = "adamw",
    compiled: bool = False,
) -> PathTrainer:
    """On rows that repeat, so that there is something to learn, with padding at their ends."""
    topology = Topology.of(config)
    path = path or topology.paths[0]
    number = topology.paths.index(path)
    length = config.model.sequence_tokens
    pattern = np.random.default_rng(number).integers(2, config.model.vocab_size, 7)
    rows = np.stack([np.roll(np.resize(pattern, length), shift) for shift in range(16)])
    rows[::3, -number - 3 :] = config.model.pad_token
    shard = Shard(path=path, train=rows.astype(np.uint16), valid=rows[:8].astype(np.uint16))
    net = PathNet(config.model)
    initialize(net, number)
    trainer = PathTrainer(
        config, topology, path, shard, device=device, optimizer=optimizer, compiled=compiled
    )
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    return trainer


def losses_of(trainer: PathTrainer, num_steps: int = NUM_STEPS, first: int = 0) -> torch.Tensor:
    return torch.stack([trainer.train_step(first + step) for step in range(num_steps)]).cpu()


def assert_same_course(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs[-1] < 0.7 * theirs[0]  # something was learnt
    assert torch.allclose(ours, theirs, rtol=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpu_trains_as_a_cpu_does(large_enough: RunConfig, tied: bool) -> None:
    config = replace(large_enough, model=replace(large_enough.model, tied_embedding=tied))
    on_cpu, on_gpu = a_trainer(config, "cpu"), a_trainer(config, "cuda")
    before = on_gpu.evaluate(8)
    assert before.perplexity == pytest.approx(on_cpu.evaluate(8).perplexity, rel=0.02)
    assert_same_course(losses_of(on_gpu), losses_of(on_cpu))
    ours, theirs = on_gpu.evaluate(8), on_cpu.evaluate(8)
    assert ours.num_tokens == theirs.num_tokens
    assert ours.nll_sum == pytest.approx(theirs.nll_sum, rel=0.03)
    scores = on_gpu.score_rows(on_gpu.valid_rows(8)), on_cpu.score_rows(on_cpu.valid_rows(8))
    assert torch.allclose(*scores, rtol=0.1)


def test_what_is_written_to_a_gpu_is_read_from_it(large_enough: RunConfig) -> None:
    trainer = a_trainer(large_enough, "cuda")
    for module in trainer.modules:
        vector = torch.randn_like(trainer.read_module(module))
        trainer.write_module(module, vector)
        assert torch.equal(trainer.read_module(module), vector)
        trainer.add_to_module(module, vector)
        assert torch.equal(trainer.read_module(module), vector + vector)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_optimizer_goes_on_from_its_file(
    large_enough: RunConfig, optimizer: OptimizerName, tmp_path: Path
) -> None:
    file = tmp_path / "optimizer"
    trainer = a_trainer(large_enough, "cuda", optimizer=optimizer)
    losses_of(trainer)
    trainer.save_optimizer(file)
    other = a_trainer(large_enough, "cuda", optimizer=optimizer)
    for module in trainer.modules:
        other.write_module(module, trainer.read_module(module))
    assert other.load_optimizer(file)
    assert other.num_steps == NUM_STEPS
    ours, theirs = (losses_of(t, 10, NUM_STEPS) for t in (other, trainer))
    assert torch.allclose(ours, theirs, rtol=0.01)


def test_eight_bits_train_as_32_do(large_enough: RunConfig) -> None:
    in_full = losses_of(a_trainer(large_enough, "cuda"))
    assert_same_course(losses_of(a_trainer(large_enough, "cuda", optimizer="adamw8bit")), in_full)


@pytest.mark.parametrize(("before", "after"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_optimizer_moves_between_gpu_and_cpu(
    large_enough: RunConfig, before: str, after: str, tmp_path: Path
) -> None:
    trainer, other = a_trainer(large_enough, before), a_trainer(large_enough, after)
    losses_of(trainer)
    trainer.save_optimizer(tmp_path / "optimizer")
    for module in trainer.modules:
        other.write_module(module, trainer.read_module(module))
    assert other.load_optimizer(tmp_path / "optimizer")
    ours, theirs = (losses_of(t, 10, NUM_STEPS) for t in (other, trainer))
    assert torch.allclose(ours, theirs, rtol=0.03)


def test_a_compiled_trainer_trains_alike(large_enough: RunConfig) -> None:
    require_compiler(torch.device("cuda"))
    plain = losses_of(a_trainer(large_enough, "cuda"))
    assert_same_course(losses_of(a_trainer(large_enough, "cuda", compiled=True)), plain)


def test_paths_train_side_by_side_as_they_do_alone(large_enough: RunConfig) -> None:
    paths = Topology.of(large_enough).paths
    together = [a_trainer(large_enough, "cuda", path=path) for path in paths]
    steps = []
    for step in range(NUM_STEPS):
        for trainer in together:
            trainer.begin_step(step)
        steps.append(torch.stack([trainer.end_step() for trainer in together]))
    ours = torch.stack(steps).cpu()
    for number, path in enumerate(paths):
        alone = a_trainer(large_enough, "cuda", path=path)
        assert_same_course(ours[:, number], losses_of(alone))
        for module in alone.modules:
            vectors = [trainer.read_module(module) for trainer in (alone, together[number])]
            assert torch.allclose(*vectors, atol=1e-3)


def test_what_changes_between_recorded_steps_counts(large_enough: RunConfig) -> None:
    """Parameters, batches with more padding, the optimizer, and the learning rate."""
    ours, theirs = a_trainer(large_enough, "cuda"), a_trainer(large_enough, "cpu")
    losses_of(ours), losses_of(theirs)
    for trainer in (ours, theirs):
        for module in trainer.modules:
            trainer.write_module(module, 0.5 * trainer.read_module(module))
    assert torch.allclose(losses_of(ours, 5, 100), losses_of(theirs, 5, 100), rtol=0.03)
    for trainer in (ours, theirs):
        trainer.forget()
    assert ours.num_steps == 0
    assert torch.allclose(losses_of(ours, 8), losses_of(theirs, 8), rtol=0.03)
    at_the_end = large_enough.rounds.total_steps
    before = [ours.read_module(module) for module in ours.modules]
    losses_of(ours, 1, at_the_end)
    late = [ours.read_module(m) - b for m, b in zip(ours.modules, before, strict=True)]
    losses_of(ours, 1, 0)
    rate = large_enough.inner.final_learning_rate_fraction
    early = [ours.read_module(m) - b for m, b in zip(ours.modules, before, strict=True)]
    for some, more in zip(late, early, strict=True):
        assert float(some.norm()) < 3 * rate * float((more - some).norm())


def test_others_are_scored_while_one_trains(large_enough: RunConfig) -> None:
    """As the swarm does it: on another thread, in a network of its own."""
    trainer = a_trainer(large_enough, "cuda")
    rows = trainer.valid_rows(8)
    vectors = {module: trainer.read_module(module) for module in trainer.modules}
    before = trainer.evaluate_rows(rows)
    with ThreadPoolExecutor(1) as pool:
        scored = [pool.submit(trainer.evaluate_modules, vectors, rows) for _ in range(20)]
        losses = losses_of(trainer)
        assert {future.result() for future in scored} == {before}
    assert_same_course(losses, losses_of(a_trainer(large_enough, "cuda")))
