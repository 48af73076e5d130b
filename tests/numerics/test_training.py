"""The parts of the loop on one machine beyond Algorithm 1: resuming, phases, turns, evaluation."""

import errno
import fcntl
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import Tensor

from dipaco.batches import Batches
from dipaco.config import InnerConfig, RoutingConfig, RunConfig, TopologyConfig
from dipaco.dense import dense_trainer, evaluate_dense
from dipaco.errors import BadBytes, ConfigError
from dipaco.evaluate import Evaluation, total
from dipaco.inner import PathTrainer
from dipaco.model import PathNet
from dipaco.preparation import prepare_start
from dipaco.reference import Options, max_turns, paths_of_round, train
from dipaco.rerouting import boundaries, evaluate_choices
from dipaco.rounds import RoundFiles, hold_latest_round, latest_round
from dipaco.start import Start
from dipaco.topology import ModuleID, PathID, Topology
from dipaco.trained import (
    TrainedModel,
    evaluate_model,
    train_token_router_of,
    training_directory,
)


class Interrupted(Exception):  # noqa: N818 - not an error
    pass


@pytest.fixture(scope="module")
def phased(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A run that shards its data anew after its first round, with 8-bit outer gradients."""
    routing = replace(
        tiny.routing, method="discriminative", phases=(1,), router_fraction=0.1, overlap=2
    )
    corpus = replace(tiny.corpus, test_fraction=0.1)
    outer = replace(tiny.outer, wire_format="int8")
    config = replace(tiny, routing=routing, corpus=corpus, outer=outer)
    return prepare_start(config, tmp_path_factory.mktemp("phased"))


@pytest.fixture(scope="module")
def trained(phased: Start) -> TrainedModel:
    directory = training_directory(phased.directory, phased.config)
    train(phased, directory, num_rounds=3, options=Options(early_stopping=True))
    return TrainedModel.load(phased.directory)


@pytest.mark.parametrize("interrupted_at", [1, 22, 40])
def test_an_interrupted_training_continues_bit_for_bit(
    phased: Start, trained: TrainedModel, interrupted_at: int, tmp_path: Path
) -> None:
    """Interrupted at any step: in the first round, before or after the new sharding."""
    done = 0

    def interrupt(path: PathID, position: int) -> None:
        nonlocal done
        done += 1
        if done == interrupted_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(phased, tmp_path, num_rounds=3, on_step=interrupt)
    steps: list[int] = []
    result = train(
        phased, tmp_path, num_rounds=3, on_step=lambda path, position: steps.append(position)
    )
    steps_per_round = phased.config.rounds.inner_steps * phased.topology.num_paths
    assert len(steps) == 3 * steps_per_round - (interrupted_at - 1) // steps_per_round * (
        steps_per_round
    )
    for module, state in result.states.items():
        assert torch.equal(state.parameters, trained.files.state(module).parameters)
        assert torch.equal(state.momentum, trained.files.state(module).momentum)


def test_a_phase_shards_anew_by_what_the_paths_predict_best(
    phased: Start, trained: TrainedModel
) -> None:
    before, after = phased.sharding, trained.sharding
    assert before.router_file.read_bytes() != after.router_file.read_bytes()
    num_rows = len(phased.rows("train"))
    for sharding in (before, after):
        shards = [sharding.shard(path) for path in phased.topology.paths]
        # Each sequence lies in the shards of its two best paths; validation in one only.
        assert sum(len(shard.train) for shard in shards) >= 2 * num_rows
        assert sum(len(shard.valid) for shard in shards) == len(phased.rows("valid"))


def test_the_start_is_scored_on_the_rows_that_the_end_is_scored_on(
    phased: Start, trained: TrainedModel
) -> None:
    result = train(phased, trained.files.directory.parent, num_rounds=3)
    assert result.sharding != phased.sharding
    start = evaluate_dense(result.sharding, dense_trainer(phased, num_steps=0))
    for path in phased.topology.paths:
        assert result.at_start[path].num_tokens == result.at_end[path].num_tokens
        assert result.at_start[path].nll_sum == pytest.approx(start[path].nll_sum, rel=1e-5)


def test_router_data_is_trained_on_by_nobody(phased: Start) -> None:
    router = {row.tobytes() for row in phased.rows("router")}
    assert router
    for path in phased.topology.paths:
        assert not router & {row.tobytes() for row in phased.shard(path).train}


def test_there_is_never_more_router_data_than_fits_into_memory(
    phased: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = phased.rows("router")
    assert len(phased.router_data()) == len(everything)
    monkeypatch.setattr("dipaco.start.MAX_FIT_SEQUENCES", 5)
    some = phased.router_data()
    assert len(some) == 5
    assert np.array_equal(some[[0, -1]], everything[[0, -1]]), "spread over all of it"


def test_each_path_gets_its_turn(tiny: RunConfig) -> None:
    topology = TopologyConfig(levels=(8, 8, 8))
    model = replace(tiny.model, num_blocks=3)
    rounds = replace(tiny.rounds, paths_per_round=100)
    config = replace(tiny, topology=topology, model=model, rounds=rounds)
    cut = Topology.of(config)
    turns = [paths_of_round(config, cut, round_) for round_ in range(6)]
    assert sorted(path for turn in turns for path in turn) == list(cut.paths)
    assert turns[0] != paths_of_round(config, cut, 6)
    for num_rounds in (5, 6, 7, 18):
        run = replace(config, rounds=replace(rounds, num_rounds=num_rounds))
        turns = [paths_of_round(run, cut, round_) for round_ in range(num_rounds)]
        assert max_turns(run, cut) == max(Counter(chain(*turns)).values())
    assert max_turns(tiny, Topology.of(tiny)) == tiny.rounds.num_rounds


def test_a_part_of_the_paths_trains_in_a_round(start: Start, tmp_path: Path) -> None:
    rounds = replace(start.config.rounds, paths_per_round=1)
    some = prepare_start(replace(start.config, rounds=rounds), start.directory)
    reports = []
    result = train(some, tmp_path, num_rounds=1, on_round=reports.append)
    (path,) = reports[0].losses
    assert set(reports[0].norm_ratios) == set(some.topology.modules_of(path))
    moved = {module for module, state in result.states.items() if state.momentum.any()}
    assert moved == set(some.topology.modules_of(path))
    for scored in some.topology.paths:
        trainer = PathTrainer(some.config, some.topology, scored, some.shard(scored))
        for module in trainer.modules:
            trainer.write_module(module, result.states[module].parameters)
        found = trainer.evaluate(some.config.rounds.eval_sequences)
        assert result.at_end[scored] == found != result.at_start[scored]
    assert train(some, tmp_path, num_rounds=1).at_end == result.at_end


def test_a_rate_by_paths_is_that_of_the_module_whoever_has_a_turn(
    start: Start, tmp_path: Path
) -> None:
    """The embedding is shared by four paths, one of which trains; the others' rate is 0."""
    rounds = replace(start.config.rounds, paths_per_round=1)
    outer = replace(start.config.outer, learning_rate_by_paths=((1.0, 0.0), (4.0, 0.7)))
    config = replace(start.config, rounds=rounds, outer=outer)
    some = prepare_start(config, start.directory)
    states = train(some, tmp_path, num_rounds=1).states
    moved = {
        module
        for module, state in states.items()
        if not torch.equal(state.parameters, some.module_state(module).parameters)
    }
    assert moved == {ModuleID(0, 0)}


def test_replicas_of_one_path_are_diloco(tiny: RunConfig, tmp_path: Path) -> None:
    """Replicas see different batches, and their outer gradients are averaged."""
    config = replace(tiny, topology=TopologyConfig(levels=(1,)))
    single = prepare_start(config, tmp_path / "start")
    ratios = []
    for replicas in (1, 3):
        files = tmp_path / str(replicas)
        train(single, files, num_rounds=1, options=Options(replicas=replicas))
        latest = latest_round(files, config)
        assert latest is not None
        ratios.append(max(latest.reports()[-1].norm_ratios.values()))
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[1] < 0.99


def test_a_round_of_many_contributions_needs_few_open_files(start: Start, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = len(os.listdir("/proc/self/fd")) + 32
    options = Options(replicas=8)
    assert options.replicas * start.topology.num_paths * len(start.topology.levels) > 2 * 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        train(start, tmp_path, num_rounds=1, options=options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_system_without_hard_links_will_do(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = train(start, tmp_path / "linked", num_rounds=2)
    refused: list[object] = []

    def no_link(*names: object) -> None:
        refused.append(names)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", no_link)
    copied = train(start, tmp_path / "copied", num_rounds=2)
    assert refused
    assert copied.digests == linked.digests


def test_the_loss_of_a_path_is_the_mean_of_its_replicas(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[PathID, list[float]] = {}
    end_step = PathTrainer.end_step

    def spy(trainer: PathTrainer) -> Tensor:
        loss = end_step(trainer)
        seen.setdefault(trainer.path, []).append(loss.item())
        return loss

    monkeypatch.setattr(PathTrainer, "end_step", spy)
    train(start, tmp_path, num_rounds=1, options=Options(replicas=2))
    latest = latest_round(tmp_path, start.config)
    assert latest is not None
    for path, loss in latest.reports()[-1].losses.items():
        assert len(seen[path]) == 2 * start.config.rounds.inner_steps
        assert loss == pytest.approx(fmean(seen[path]))


def test_a_training_goes_on_with_its_own_options_only(start: Start, tmp_path: Path) -> None:
    """What others make of the same configuration is not taken for theirs."""
    train(start, tmp_path, num_rounds=1, options=Options(replicas=2))
    for wrong in (Options(), Options(replicas=3)):
        with pytest.raises(ConfigError, match="2 replicas of each path"):
            train(start, tmp_path, num_rounds=2, options=wrong)
    train(start, tmp_path, num_rounds=2, options=Options(replicas=2))
    late = Options(replicas=2, early_stopping=True)
    with pytest.raises(ConfigError, match="ended without early stopping"):
        train(start, tmp_path, num_rounds=2, options=late)
    train(start, tmp_path, num_rounds=3, options=late)


def rounds_in(directory: Path) -> list[str]:
    return sorted(folder.name for folder in directory.glob("round-*"))


def test_a_model_can_be_used_while_it_is_trained(start: Start, tmp_path: Path) -> None:
    """Its round stays until it is let go of, be that while nothing is trained."""
    directory = Path(shutil.copytree(start.directory, tmp_path / "start"))
    start = prepare_start(start.config, directory)
    files = training_directory(directory, start.config)
    train(start, files, num_rounds=1)
    used = TrainedModel.load(directory)
    train(start, files, num_rounds=2)
    later = TrainedModel.load(directory)
    assert (used.round, later.round) == (1, 2)
    for number in range(start.topology.num_paths):
        used.net(number)
    del used
    train(start, files, num_rounds=3)
    assert rounds_in(files) == ["round-000002", "round-000003"]
    del later
    train(start, files, num_rounds=3)
    assert rounds_in(files) == ["round-000003"]


def test_a_round_that_is_deleted_before_it_is_held_is_not_taken(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [tmp_path / name for name in ("round-000000", "round-000001", "round-000002")]
    for folder in found[1:]:
        folder.mkdir()
    rounds = (RoundFiles(folder, start.config) for folder in found)
    monkeypatch.setattr("dipaco.rounds.latest_round", lambda *_: next(rounds))
    with held(found[1]):
        taken = hold_latest_round(tmp_path, start.config)
    assert taken is not None
    assert taken.number == 2


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it is being deleted."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_damaged_optimizer_is_not_taken_for_a_new_one(start: Start, tmp_path: Path) -> None:
    train(start, tmp_path, num_rounds=1)
    files = latest_round(tmp_path, start.config)
    assert files is not None
    file = files.optimizer_file(start.topology.paths[1], 0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadBytes, match="is damaged"):
        train(start, tmp_path, num_rounds=2)


def test_the_dense_model_goes_on_with_what_its_start_has_not_seen(start: Start) -> None:
    dense, rows = start.config.dense_start, start.rows("train")
    num_seen = dense.steps * dense.batch_sequences
    assert num_seen < len(rows), "else there is nothing left to see"
    trainer = dense_trainer(start, num_steps=4)
    of_start = Batches(
        rows,
        batch_sequences=dense.batch_sequences,
        seed=start.config.seed,
        path=trainer.path,
    )
    seen = {bytes(row.numpy()) for n in range(dense.steps) for row in of_start.batch(n)}
    assert seen.isdisjoint(bytes(row.numpy()) for row in trainer.next_batch())


def test_paths_side_by_side_end_where_they_end_one_after_another(
    start: Start, tmp_path: Path
) -> None:
    """Three of four at once, then the fourth alone: bit for bit, on a CPU."""
    alone = train(start, tmp_path / "alone", num_rounds=2)
    together = train(start, tmp_path / "three", num_rounds=2, options=Options(side_by_side=3))
    assert together.digests == alone.digests
    assert together.at_end == alone.at_end


def harmful(start: Start) -> InnerConfig:
    """Inner steps that make a path worse, so that an earlier round was better."""
    return replace(start.config.inner, learning_rate=0.1)


def kept_perplexity(trained: TrainedModel, number: int) -> float:
    """Of the early-stopped path of that number, on the validation rows of its shard."""
    path = trained.start.topology.paths[number]
    rows = trained.sharding.shard(path).valid[: trained.config.rounds.eval_sequences]
    found = evaluate_choices(
        lambda _: trained.net(number, early_stopped=True),
        rows,
        np.zeros((len(rows), 1), dtype=np.int64),
        at=[trained.config.routing.prefix_tokens],
        model=trained.config.model,
    )
    return total(found).perplexity


def test_early_stopping_keeps_each_path_at_its_best(trained: TrainedModel) -> None:
    reports = trained.files.reports()
    for number, path in enumerate(trained.start.topology.paths):
        best = min(report.evaluations[path].perplexity for report in reports[2:])
        assert kept_perplexity(trained, number) == pytest.approx(best, rel=1e-5)


def test_early_stopping_forgets_what_was_measured_on_another_shard(
    phased: Start, tmp_path: Path
) -> None:
    """Also where only some paths train in a round, and keep their last figures meanwhile."""
    directory = Path(shutil.copytree(phased.directory, tmp_path / "start"))
    rounds = replace(phased.config.rounds, num_rounds=8, paths_per_round=1)
    routing = replace(phased.config.routing, phases=(4,))
    config = replace(phased.config, rounds=rounds, routing=routing, inner=harmful(phased))
    some = prepare_start(config, directory)
    files = training_directory(directory, some.config)
    train(some, files, num_rounds=5, options=Options(early_stopping=True))
    trained = TrainedModel.load(directory)
    (latest,) = trained.files.reports()[-1].losses
    for number, path in enumerate(some.topology.paths):
        best = trained.best(number, early_stopped=None)
        assert (best is not None) == (path == latest), "others were not scored on the new shard yet"
    train(some, files, num_rounds=8, options=Options(early_stopping=True))
    trained = TrainedModel.load(directory)
    reports = trained.files.reports()
    was_better_before = False
    for number, path in enumerate(some.topology.paths):
        before, after = (r.evaluations[path].perplexity for r in reports if path in r.losses)
        was_better_before = was_better_before or before < after
        assert kept_perplexity(trained, number) == pytest.approx(after, rel=1e-5)
    assert was_better_before, "nothing was there to be forgotten"


def test_early_stopping_may_begin_in_a_later_round(start: Start, tmp_path: Path) -> None:
    """Rounds before it count for nothing, since nothing was kept; from then on it goes on."""
    directory = Path(shutil.copytree(start.directory, tmp_path / "start"))
    start = prepare_start(replace(start.config, inner=harmful(start)), directory)
    files = training_directory(directory, start.config)
    for num_rounds, early_stopping in ((1, False), (2, True), (4, False)):
        options = Options(early_stopping=early_stopping)
        train(start, files, num_rounds=num_rounds, options=options)
    trained = TrainedModel.load(directory)
    was_better_before = False
    for number, path in enumerate(start.topology.paths):
        perplexities = [report.evaluations[path].perplexity for report in trained.files.reports()]
        before, after = min(perplexities[:2]), min(perplexities[2:])
        was_better_before = was_better_before or before < after
        assert kept_perplexity(trained, number) == pytest.approx(after, rel=1e-5)
    assert was_better_before, "nothing was there to be left out"
    assert not (trained.files.directory / "contributions").exists(), "kept beyond the round"


def test_the_token_level_router_learns_of_the_paths_that_are_used(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool | None] = []

    def net(self: TrainedModel, number: int, *, early_stopped: bool | None) -> PathNet:
        asked.append(early_stopped)
        return taken(self, number, early_stopped=early_stopped)

    taken = TrainedModel.net
    monkeypatch.setattr(TrainedModel, "net", net)
    train_token_router_of(trained, 1, early_stopped=None)
    assert asked == [None] * trained.start.topology.num_paths
    trained.token_router_file.unlink()


def test_rerouting_scores_every_token_once(trained: TrainedModel) -> None:
    once = total(evaluate_model(trained, trained.start.rows("test")))
    often = evaluate_model(trained, trained.start.rows("test"), every=8)
    assert total(often).num_tokens == once.num_tokens > 0
    assert len(often) > 1


def test_evaluation_loads_one_path_at_a_time_and_agrees_with_training(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored by the shards' own rows, or routed anew: the same whole."""
    monkeypatch.setattr(TrainedModel, "net", counted(TrainedModel.net, loaded := []))
    routed = total(evaluate_model(trained, trained.start.rows("valid")))
    assert len(loaded) == len(set(loaded)) <= trained.start.topology.num_paths
    by_shard = []
    for number, path in enumerate(trained.start.topology.paths):
        rows = trained.sharding.shard(path).valid
        found = evaluate_choices(
            trained.net,
            rows,
            np.full((len(rows), 1), number),
            at=[trained.config.routing.prefix_tokens],
            model=trained.config.model,
        )
        by_shard.append(total(found))
    together: Evaluation = sum(by_shard[1:], by_shard[0])
    assert together.num_tokens == routed.num_tokens
    assert together.perplexity == pytest.approx(routed.perplexity, rel=1e-3)


def counted(
    function: Callable[..., torch.nn.Module], calls: list[int]
) -> Callable[..., torch.nn.Module]:
    def call(self: TrainedModel, number: int, **options: bool) -> torch.nn.Module:
        calls.append(number)
        return function(self, number, **options)

    return call


def test_boundaries_begin_after_the_prefix() -> None:
    assert boundaries(prefix_tokens=32, sequence_tokens=128, every=0) == [32]
    assert boundaries(prefix_tokens=32, sequence_tokens=128, every=40) == [32, 72, 112]


def test_a_prompt_of_any_length_has_a_path(trained: TrainedModel) -> None:
    tokens = [int(token) for token in trained.start.rows("test")[0]]
    for length in (1, 31, 64):
        assert 0 <= trained.choose(tokens[:length]) < 4
    with pytest.raises(ConfigError, match="prompt is empty"):
        trained.choose([])


def test_without_router_data_there_is_no_phase(tiny: RunConfig) -> None:
    with pytest.raises(ConfigError, match="without a phase or router data"):
        RoutingConfig(method="discriminative", phases=(2,))
    with pytest.raises(ConfigError, match=r"phases is \[4, 2\]"):
        RoutingConfig(method="discriminative", phases=(4, 2), router_fraction=0.1)


def test_the_whole_learns(trained: TrainedModel) -> None:
    first, *_, last = trained.files.reports()
    assert total(last.evaluations).perplexity < total(first.evaluations).perplexity
