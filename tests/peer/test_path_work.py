"""A path's work through a change of manifest: nothing that was trained is lost or counted twice."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dipaco.checkpoint import ModuleState
from dipaco.compression import decode
from dipaco.config import RunConfig, TopologyConfig
from dipaco.inner import PathTrainer
from dipaco.tensors import encode_tensors
from dipaco.topology import ModuleID, PathID, Topology
from peer.draft import Draft
from peer.path_files import RESIDUAL_SUFFIX
from peer.path_work import PathWork, Rebasing
from tests.little_run import little_config, make_shards

PATH = PathID((0, 0))
NO_LIMIT = 1000.0


def trainer_of(config: RunConfig, *, seed: int) -> PathTrainer:
    shard = make_shards(config, seed=seed)[PATH]
    return PathTrainer(config, Topology.of(config), PATH, shard)


def begun(config: RunConfig, directory: Path) -> PathWork:
    work = PathWork(trainer_of(config, seed=1), directory)
    for module in work.trainer.modules:
        vector = torch.zeros_like(work.trainer.read_module(module)).normal_(0, 0.02)
        work.begin(module, 0, "a" * 64, ModuleState.initial(vector))
    return work


@pytest.mark.parametrize("levels", [(2, 2), (3, 4)])
def test_another_shard_or_more_modules_leave_progress_and_optimizer(
    tmp_path: Path, levels: tuple[int, ...]
) -> None:
    config = little_config()
    work = begun(config, tmp_path)
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
    before = [draft.encode() for draft in work.drafts(config)]
    grown = replace(config, topology=TopologyConfig(levels=levels))
    work.save()
    work.change_trainer(lambda: trainer_of(grown, seed=2))
    assert work.trainer.num_steps == 2, "the optimizer goes on"
    assert [draft.encode() for draft in work.drafts(grown)] == before
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
    assert work.drafts(grown)[0].tokens == 3 * work.trainer.tokens_per_step


def test_who_trains_a_path_goes_on_after_all_that_was_trained(tmp_path: Path) -> None:
    config = little_config()
    work = begun(config, tmp_path)
    step = work.trainer.tokens_per_step

    def place(num_counted: int, *, rank: int = 0, num_peers: int = 1, under_way: int = 0) -> int:
        counted = dict.fromkeys(work.trainer.modules, num_counted * step)
        work.go_on_after(counted, rank=rank, num_peers=num_peers, under_way=under_way)
        return work.trainer.next_batch_number

    assert place(10, under_way=2 * step + 1) == 12, "behind those who are not counted yet"
    work.train(seconds=NO_LIMIT, max_steps=3, first_step=0)
    assert place(10) == 15, "what this peer has trained it does not train again"
    assert place(13) == 16, "its own is not counted yet"
    assert place(13, rank=1, num_peers=2) == 13 + 2 * 3 + 1, "two of them have done as much"
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=3)
    assert work.trainer.next_batch_number == 20 + 2 * 2
    assert place(0, num_peers=2) == 24, "it never goes back"


def test_a_residual_is_sent_once_when_the_wire_format_changes(tmp_path: Path) -> None:
    coarse = little_config(wire_format="float16")
    exact = little_config(wire_format="float32")
    work = begun(coarse, tmp_path)
    [module, *_] = work.trainer.modules
    carries_residual = []
    for version, config in enumerate((coarse, exact, exact), start=1):
        base = work.trainer.read_module(module)
        work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
        gradient = base - work.trainer.read_module(module)
        [draft] = work.drafts(config, [module])
        sent = decode(draft.encode().raw, config.outer.wire_format, num_parameters=gradient.numel())
        carries_residual.append(not torch.equal(sent, gradient))
        state = ModuleState.initial(work.trainer.read_module(module))
        work.rebase(work.rebasing(module, version, "b" * 64, state, counted=draft.blob))
    # The first is rounded, the second carries what the first lost, the third has nothing to carry.
    assert carries_residual == [True, True, False]


def residuals_on_disk(work: PathWork, config: RunConfig) -> dict[ModuleID, Tensor]:
    """What the next start on the path sends besides what it trains."""
    again = begun(config, work._directory)
    starts = {module: again.trainer.read_module(module) for module in again.trainer.modules}
    again.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
    taken_up = {}
    for module, draft in zip(starts, again.drafts(config), strict=True):
        draft.encode()
        assert draft._encoded is not None
        gradient = starts[module] - again.trainer.read_module(module)
        taken_up[module] = draft._encoded[0] - gradient
    return taken_up


@pytest.mark.parametrize("wire_format", ["int4", "topk"])
def test_a_residual_that_is_sent_already_is_not_sent_by_the_next_start(
    tmp_path: Path, wire_format: str
) -> None:
    config = little_config(wire_format=wire_format, blocking=False)
    work = begun(config, tmp_path)
    [counted, ignored, unsent] = work.trainer.modules

    def assert_saved(drafts: Mapping[ModuleID, Draft]) -> None:
        """Each module's residual is what its draft lost; nothing, where there is none."""
        work.save()
        saved = residuals_on_disk(work, config)
        for module, vector in saved.items():
            left = drafts[module].lost() if module in drafts else torch.zeros_like(vector)
            assert left is not None
            assert torch.allclose(vector, left, atol=1e-6), module
            assert module not in drafts or vector.abs().max() > 1e-4

    def drafted(*modules: ModuleID) -> dict[ModuleID, Draft]:
        work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
        drafts = dict(zip(modules, work.drafts(config, modules), strict=True))
        for draft in drafts.values():
            draft.encode()
        return drafts

    first = drafted(counted, ignored)
    work.drafts(config, [unsent])  # and not encoded
    assert_saved(first)
    second = drafted(counted, ignored, unsent)
    assert_saved(second)
    state = ModuleState.initial(work.trainer.read_module(counted))
    work.rebase(work.rebasing(counted, 1, "b" * 64, state, counted=second[counted].blob))
    assert_saved(second)
    # What is not counted keeps its progress, and the residual that was there before it: none.
    state = ModuleState.initial(work.trainer.read_module(ignored))
    work.rebase(work.rebasing(ignored, 1, "b" * 64, state, counted=None))
    assert_saved({counted: second[counted], unsent: second[unsent]})


def test_residuals_go_from_the_disk_with_those_in_memory(tmp_path: Path) -> None:
    config = little_config(wire_format="int4", blocking=False)
    work = begun(config, tmp_path)
    file = tmp_path / f"{PATH}{RESIDUAL_SUFFIX}"

    def send(config: RunConfig) -> None:
        work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
        for draft in work.drafts(config):
            draft.encode()
        work.save()

    send(config)
    assert file.exists()
    send(little_config(wire_format="float32", blocking=False))  # it takes them along
    assert not file.exists()
    send(config)
    assert file.exists()
    module = work.trainer.modules[0]
    nan = torch.full_like(work.trainer.read_module(module), float("nan"))
    work.trainer.write_module(module, nan)
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
    assert work.num_divergences == 1
    assert not file.exists()
    work.save()
    assert not file.exists()


def test_of_a_file_of_residuals_each_module_takes_what_fits_it(tmp_path: Path) -> None:
    config = little_config(wire_format="int4", blocking=False)
    work = begun(config, tmp_path)
    [there, missing, odd] = work.trainer.modules
    residuals = {
        str(there): torch.full_like(work.trainer.read_module(there), 0.5),
        str(odd): torch.full_like(work.trainer.read_module(odd), float("inf")),
        "9.9": torch.zeros(3),
    }
    (tmp_path / f"{PATH}{RESIDUAL_SUFFIX}").write_bytes(encode_tensors(residuals))
    taken_up = residuals_on_disk(work, config)
    assert torch.allclose(taken_up[there], residuals[str(there)], atol=1e-6)
    assert taken_up[missing].abs().max() < 1e-6
    assert taken_up[odd].abs().max() < 1e-6


def test_a_new_version_keeps_what_was_trained_since_the_contribution_that_it_counts(
    tmp_path: Path,
) -> None:
    config = little_config()
    work = begun(config, tmp_path)
    [module, *_] = work.trainer.modules
    read = work.trainer.read_module
    start, tokens = read(module), work.trainer.tokens_per_step
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
    [draft] = work.drafts(config, [module])
    taken = read(module)
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=2)  # before it is encoded
    offer = draft.encode()
    assert torch.equal(decode(offer.raw, "float32", num_parameters=len(start)), start - taken)
    version = ModuleState.initial(torch.full_like(start, 0.5))
    counting = work.rebasing(module, 1, "b" * 64, version, counted=draft.blob)
    # What was committed in this slot before a restart is not what this draft holds.
    ignoring = work.rebasing(module, 1, "b" * 64, version, counted="c" * 64)
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=3)  # while the version is prepared for
    before = read(module)
    assert torch.allclose(before + ignoring.change, version.parameters + before - start, atol=1e-6)
    work.rebase(counting)
    assert torch.allclose(read(module), version.parameters + before - taken, atol=1e-6)
    [rest] = work.drafts(config, [module])
    assert (rest.tokens, rest.encode().base_version) == (2 * tokens, 1)
    work.rebase(counting)
    assert work.drafts(config, [module])[0].tokens == 2 * tokens, "a version is put there once"


@pytest.mark.parametrize("counted", range(6))
def test_nothing_is_counted_twice_however_late_a_version_comes(
    tmp_path: Path, counted: int
) -> None:
    """Which of six contributions it counts: one that is remembered, or not any more."""
    config = little_config(wire_format="int4", blocking=False)
    work = begun(config, tmp_path)
    [module, *_] = work.trainer.modules
    blobs, taken = [], []
    for slot in range(6):
        work.train(seconds=NO_LIMIT, max_steps=1, first_step=slot)
        [draft] = work.drafts(config, [module])
        draft.encode()
        blobs.append(draft.blob)
        taken.append(work.trainer.read_module(module))
    version = ModuleState.initial(torch.full_like(taken[0], 0.5))
    late = taken[-1] - taken[counted]
    work.rebase(work.rebasing(module, 1, "b" * 64, version, counted=blobs[counted]))
    is_remembered = counted in (0, 4, 5)
    left = work.trainer.read_module(module) - version.parameters
    assert torch.allclose(left, late if is_remembered else torch.zeros_like(late), atol=1e-6)
    drafts = work.drafts(config, [module])
    num_steps = sum(draft.tokens for draft in drafts) // work.trainer.tokens_per_step
    assert num_steps == (5 - counted if is_remembered else 0)


def test_the_version_that_wins_a_fork_takes_the_place_of_the_one_that_lost(tmp_path: Path) -> None:
    config = little_config()
    work = begun(config, tmp_path)
    [applied, prepared, *_] = work.trainer.modules
    read, tokens = work.trainer.read_module, work.trainer.tokens_per_step
    starts = {module: read(module) for module in (applied, prepared)}
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
    drafts = dict(zip(starts, work.drafts(config, starts), strict=True))
    for draft in drafts.values():
        draft.encode()
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=2)

    def version(module: ModuleID, state: str, value: float, *, counted: str | None) -> Rebasing:
        parameters = torch.full_like(read(module), value)
        return work.rebasing(module, 1, state, ModuleState.initial(parameters), counted=counted)

    def left(module: ModuleID) -> tuple[int, str]:
        [draft] = work.drafts(config, [module])
        return draft.tokens, draft.encode().base_state

    # The loser is under the path: what it counted is lost with it, what was trained since is not.
    loser = version(applied, "b" * 64, 0.5, counted=drafts[applied].blob)
    work.rebase(loser)
    since = read(applied) - 0.5
    work.rebase(version(applied, "c" * 64, 0.25, counted=None))
    assert torch.allclose(read(applied), 0.25 + since, atol=1e-6)
    assert left(applied) == (tokens, "c" * 64)

    # The loser was only prepared for: what it alone counts was not counted.
    version(prepared, "b" * 64, 0.5, counted=drafts[prepared].blob)
    progress = read(prepared) - starts[prepared]
    work.rebase(version(prepared, "c" * 64, 0.25, counted=None))
    assert torch.allclose(read(prepared), 0.25 + progress, atol=1e-6)
    assert left(prepared) == (3 * tokens, "c" * 64)

    # An older version is none that won, whatever its state.
    state = ModuleState.initial(starts[applied])
    work.rebase(work.rebasing(applied, 2, "d" * 64, state, counted=None))
    work.rebase(loser)
    assert left(applied) == (tokens, "d" * 64)


def test_training_that_diverges_starts_over_from_the_versions_under_it(tmp_path: Path) -> None:
    config = little_config(blocking=False)
    work = begun(config, tmp_path)
    modules = work.trainer.modules
    versions = {module: work.trainer.read_module(module) for module in modules}
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
    [draft, *_] = work.drafts(config)
    draft.encode()
    state = ModuleState.initial(versions[modules[0]] + 1.0)
    under_way = work.rebasing(modules[0], 1, "b" * 64, state, counted=draft.blob)
    assert under_way.counted is draft
    work.trainer.write_module(modules[0], torch.full_like(versions[modules[0]], float("nan")))
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=2)
    assert work.num_divergences == 1
    assert work.trainer.num_steps == 0, "an optimizer that has seen that is of no use"
    assert work.is_counted
    for module, vector in versions.items():
        assert torch.equal(work.trainer.read_module(module), vector)
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
    assert work.num_divergences == 1
    trained = work.trainer.read_module(modules[0])
    work.rebase(under_way)  # to a version that counts what was given up
    assert torch.allclose(work.trainer.read_module(modules[0]), trained + 1.0, atol=1e-5)
    assert all(draft.tokens == work.trainer.tokens_per_step for draft in work.drafts(config))


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_finished_module_stays_as_it_was_certified(tmp_path: Path, is_counted: bool) -> None:
    """The others of its path have versions to come, and are trained for what it is in the end."""
    config = little_config(num_rounds=2)
    work = begun(config, tmp_path)
    [finished, *others] = work.trainer.modules
    read = work.trainer.read_module
    work.train(seconds=NO_LIMIT, max_steps=2, first_step=0)
    [draft] = work.drafts(config, [finished])
    draft.encode()
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=2)
    last = ModuleState.initial(torch.full_like(read(finished), 0.5))
    counted = draft.blob if is_counted else None
    work.rebase(work.rebasing(finished, 2, "b" * 64, last, counted=counted))
    assert torch.equal(read(finished), last.parameters)
    before = [read(module) for module in others]
    work.train(seconds=NO_LIMIT, max_steps=1, first_step=0)
    assert torch.equal(read(finished), last.parameters)
    assert not any(map(torch.equal, before, map(read, others)))
    drafts = work.drafts(config)
    assert [draft.encode().module for draft in drafts] == others
    for module, draft in zip(others, drafts, strict=True):
        state = ModuleState.initial(read(module))
        work.rebase(work.rebasing(module, 1, "c" * 64, state, counted=draft.blob))
    assert work.is_counted, "an exact run takes no further step before that"
