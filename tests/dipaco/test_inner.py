import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dipaco import inner
from dipaco.batches import Batches, step_inputs
from dipaco.config import RunConfig, TopologyConfig
from dipaco.inner import PathTrainer
from dipaco.model import PathNet, initialize, read_module
from dipaco.optimizer import learning_rate
from dipaco.shards import Shard
from dipaco.topology import ModuleID, PathID, Topology

PATH = PathID((0, 1))


def a_shard(tiny: RunConfig, num_rows: int = 10) -> Shard:
    rows = np.random.default_rng(0).integers(2, 384, (num_rows, tiny.model.sequence_tokens))
    return Shard(path=PATH, train=rows.astype(np.uint16), valid=rows[:5].astype(np.uint16))


def a_trainer(
    tiny: RunConfig, shard: Shard | None = None, *, compiled: bool = False
) -> PathTrainer:
    topology = Topology.of(tiny)
    net = PathNet(tiny.model)
    initialize(net, 0)
    path = topology.path_at(1)  # PATH, in the topology of the fixture
    trainer = PathTrainer(tiny, topology, path, shard or a_shard(tiny), compiled=compiled)
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, topology, module))
    return trainer


def test_learning_rate_warms_up_decays_and_warms_up_again(tiny: RunConfig) -> None:
    inner = replace(tiny.inner, learning_rate=1.0, warmup_steps=3, final_learning_rate_fraction=0.1)

    def rate(position: int, fresh: int) -> float:
        return learning_rate(inner, position_steps=position, total_steps=100, fresh_steps=fresh)

    assert [rate(0, fresh) for fresh in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(50, 50) == pytest.approx(0.55)
    assert rate(50, 0) == pytest.approx(0.55 / 4)
    assert rate(100, 100) == rate(1000, 1000) == pytest.approx(0.1)


def test_batches_follow_from_their_address_and_cover_each_epoch() -> None:
    rows = np.arange(10, dtype=np.uint16)[:, None].repeat(3, axis=1)

    def batches(path: PathID = PATH, seed: int = 1) -> list[int]:
        source = Batches(rows, batch_sequences=4, seed=seed, path=path)
        return [int(row[0]) for number in range(10) for row in source.batch(number)]

    seen = batches()
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert seen == batches()
    others = [batches(PathID((1, 0))), batches(seed=2)]
    assert all(other != seen for other in others)
    again = Batches(rows, batch_sequences=4, seed=1, path=PATH)
    assert [int(row[0]) for row in again.batch(7)] == seen[28:32]


def test_several_trainers_of_a_path_share_its_batches_out(tiny: RunConfig) -> None:
    def taken(first: int, stride: int, num_batches: int) -> list[list[int]]:
        trainer = a_trainer(tiny)
        trainer.seek(first, stride=stride)
        batches = []
        for step in range(num_batches):
            batches.append(trainer.next_batch().tolist())
            trainer.train_step(step)
        return batches

    alone = taken(3, 1, 4)
    assert [taken(3, 2, 2), taken(4, 2, 2)] == [alone[::2], alone[1::2]]


def test_a_batch_larger_than_the_shard_wraps_around() -> None:
    rows = np.arange(3, dtype=np.uint16)[:, None]
    batch = Batches(rows, batch_sequences=7, seed=0, path=PATH).batch(5)
    assert set(batch.flatten().tolist()) == {0, 1, 2}


def test_training_is_deterministic_and_learns(tiny: RunConfig) -> None:
    losses = [
        [trainer.train_step(step).item() for step in range(12)]
        for trainer in (a_trainer(tiny), a_trainer(tiny))
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] < math.log(384) + 0.5


def test_a_step_is_that_of_a_plain_loop(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inner.LOGITS_AT_ONCE, "cpu", 384 * 50)  # in several parts
    shard = a_shard(tiny)
    shard.train[:, -9:] = tiny.model.pad_token
    trainer = a_trainer(tiny, shard)
    net = PathNet(tiny.model)
    initialize(net, 0)
    rates = tiny.inner
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": 0.1 * (p.dim() > 1)} for p in net.parameters()],
        betas=(rates.beta1, rates.beta2),
    )
    rows = Batches(shard.train, batch_sequences=4, seed=tiny.seed, path=PATH)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                rates, position_steps=step, total_steps=12, fresh_steps=step
            )
        tokens = rows.batch(step)
        logits = net(tokens)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=tiny.model.pad_token)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), rates.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(trainer.train_step(step), loss, atol=1e-6)
    for module in trainer.modules:
        expected = read_module(net, trainer.topology, module)
        assert torch.allclose(trainer.read_module(module), expected, atol=1e-5)


def test_a_saved_optimizer_continues_bit_for_bit(tiny: RunConfig, tmp_path: Path) -> None:
    first = a_trainer(tiny)
    for step in range(3):
        first.train_step(step)
    first.save_optimizer(tmp_path / "optimizer")
    second = a_trainer(tiny)
    for module in first.modules:
        second.write_module(module, first.read_module(module))
    assert second.load_optimizer(tmp_path / "optimizer")
    assert second.num_steps == 3
    for step in range(3, 6):
        assert torch.equal(first.train_step(step), second.train_step(step))
    for module in first.modules:
        assert torch.equal(first.read_module(module), second.read_module(module))


def test_an_optimizer_that_does_not_fit_is_left_alone(tiny: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "optimizer"
    trainer = a_trainer(tiny)
    assert not trainer.load_optimizer(file)
    trainer.train_step(0)
    trainer.save_optimizer(file)
    raw = file.read_bytes()
    for wrong in (
        b"",
        raw[:-1],
        raw[:100],
        b"\xff" * 50,
        raw.replace(b"exp_avg_sq", b"exp_avg_xy"),
    ):
        file.write_bytes(wrong)
        assert not trainer.load_optimizer(file)
    file.write_bytes(raw)
    assert trainer.load_optimizer(file)


def test_eight_bit_optimizer_trains_and_is_chosen_only_when_memory_is_short(
    tiny: RunConfig, tmp_path: Path
) -> None:
    trainer = PathTrainer(tiny, Topology.of(tiny), PATH, a_shard(tiny), optimizer="adamw8bit")
    net = PathNet(tiny.model)
    initialize(net, 0)
    for module in trainer.modules:
        trainer.write_module(module, read_module(net, trainer.topology, module))
    losses = [trainer.train_step(step).item() for step in range(12)]
    assert losses[-1] < losses[0]
    trainer.save_optimizer(tmp_path / "optimizer")
    assert trainer.load_optimizer(tmp_path / "optimizer")


def test_positions_that_only_fill_up_weigh_nothing(tiny: RunConfig) -> None:
    """What a recorded step of a GPU trains on, in which every batch has one shape."""
    tokens = torch.from_numpy(a_shard(tiny).train[:4].astype(np.int64))
    tokens[0, -9:] = tiny.model.pad_token
    prefix_tokens, pad = tiny.routing.prefix_tokens, tiny.model.pad_token
    results = []
    for fill_up in (False, True):
        inputs = step_inputs(tokens, prefix_tokens=prefix_tokens, pad=pad, fill_up=fill_up)
        trainer = a_trainer(tiny)
        loss = trainer._step(*inputs, 0.01)
        results.append((inputs, loss, [trainer.read_module(m) for m in trainer.modules]))
    (short, loss, modules), (filled, filled_loss, filled_modules) = results
    assert len(filled.targets_N) == len(short.targets_N) + 9
    assert filled.positions_N.shape == filled.targets_N.shape
    assert torch.isclose(loss, filled_loss)
    for module, filled_module in zip(modules, filled_modules, strict=True):
        assert torch.allclose(module, filled_module, atol=1e-6)


def test_the_prefix_and_padding_never_count_in_evaluation(tiny: RunConfig) -> None:
    prefix = tiny.routing.prefix_tokens
    shard = a_shard(tiny)
    trainer = a_trainer(tiny, shard)
    full = trainer.evaluate(2)
    assert full.num_tokens == 2 * (tiny.model.sequence_tokens - prefix)
    assert full.perplexity == pytest.approx(384, rel=0.1)
    padded = shard.valid[:2].copy()
    padded[:, -7:] = tiny.model.pad_token
    part = trainer.evaluate_rows(padded)
    assert part.num_tokens == full.num_tokens - 14
    scores = [trainer.evaluate_rows(shard.valid[i : i + 1]) for i in range(2)]
    assert (scores[0] + scores[1]).nll_sum == pytest.approx(full.nll_sum)


def test_other_parameters_are_evaluated_beside_those_in_training(tiny: RunConfig) -> None:
    trainer = a_trainer(tiny)
    start = {module: trainer.read_module(module) for module in trainer.modules}
    expected = trainer.evaluate(5)
    trainer.train_step(0)
    trained = {module: trainer.read_module(module) for module in trainer.modules}
    assert trainer.evaluate(5) != expected
    assert trainer.evaluate_modules(start, trainer.valid_rows(5)) == expected
    for module in trainer.modules:
        assert torch.equal(trainer.read_module(module), trained[module])
        trainer.add_to_module(module, start[module] - trained[module])
        assert torch.allclose(trainer.read_module(module), start[module], atol=1e-7)


def test_training_counts_the_prefix_unless_told_otherwise(tiny: RunConfig) -> None:
    masked = replace(tiny, inner=replace(tiny.inner, train_on_prefix=False))
    shard = a_shard(tiny)
    spoiled = shard.train.copy()
    # Padding does not count as a target.
    spoiled[:, : tiny.routing.prefix_tokens] = tiny.model.pad_token
    shard = replace(shard, train=spoiled)
    whole = a_trainer(tiny, shard).train_step(0)
    assert torch.isclose(whole, a_trainer(masked, shard).train_step(0), rtol=1e-6)
    assert not torch.isclose(
        a_trainer(tiny).train_step(0), a_trainer(masked).train_step(0), rtol=1e-6
    )


def test_modules_of_other_paths_are_refused(tiny: RunConfig) -> None:
    with pytest.raises(ValueError, match="not on path"):
        a_trainer(tiny).read_module(ModuleID(1, 1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_path_trains_alike_and_the_next_one_needs_no_compiler(tiny: RunConfig) -> None:
    model = replace(tiny.model, num_blocks=1)  # as little to compile as there can be
    config = replace(tiny, model=model, topology=TopologyConfig(levels=(2,)))

    def losses(*, compiled: bool) -> list[float]:
        trainer = a_trainer(config, compiled=compiled)
        return [float(trainer.train_step(step)) for step in range(3)]

    assert losses(compiled=True) == pytest.approx(losses(compiled=False), rel=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        losses(compiled=True)
