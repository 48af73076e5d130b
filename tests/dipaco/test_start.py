import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dipaco.config import RunConfig, TopologyConfig
from dipaco.errors import BadBytes, ConfigError
from dipaco.llama import export_llama, model_section
from dipaco.preparation import check_sources, prepare_start
from dipaco.routing import ranking, router_from_bytes
from dipaco.shards import Rows, Shard
from dipaco.start import Start
from dipaco.topology import PathID


class Recorder:
    """Remembers which stages did work."""

    def __init__(self) -> None:
        self.worked: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.worked[stage] = self.worked.get(stage, 0) + 1


@pytest.fixture
def copied(start: Start, tmp_path: Path) -> Path:
    return Path(shutil.copytree(start.directory, tmp_path / "copy"))


def test_a_start_has_every_part_and_all_modules_of_a_level_are_equal(start: Start) -> None:
    topology = start.topology
    assert set(start.shard_tokens) == set(topology.paths)
    for path in topology.paths:
        shard = start.shard(path)
        assert len(shard.valid) > 0
        assert shard.num_tokens(start.config.model.pad_token) == start.shard_tokens[path] > 0
    for module in topology.modules:
        state = start.module_state(module)
        assert not state.momentum.any()
        assert state.parameters.any()
    assert start.tokenizer().vocab_size <= start.config.model.vocab_size
    for file in (start.tokenizer_file, start.router_file, start.state_file(1)):
        assert len(start.index(file).digest) == 64


def test_rows_lie_in_the_shard_that_the_router_names(start: Start) -> None:
    router, features = start.router(), start.feature_extractor()
    prefix_tokens = start.config.routing.prefix_tokens
    for index, path in enumerate(start.topology.paths):
        shard = start.shard(path)
        for rows in (shard.train, shard.valid):
            best = ranking(router, rows, features, prefix_tokens=prefix_tokens, num_best=1)
            assert (best[:, 0] == index).mean() > 0.99  # a batch rounds otherwise


def test_features_of_the_fit_are_those_of_the_shards(
    start: Start, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shards to the byte, and no training row is seen twice."""
    seen: list[int] = []

    def feature_extractor(
        self: Start, device: torch.device | str = "cpu"
    ) -> Callable[[Rows], torch.Tensor]:
        def extract(prefixes: Rows) -> torch.Tensor:
            seen.append(len(prefixes))
            return features(prefixes)

        features = extractor(self, device)
        return extract

    extractor = Start.feature_extractor
    monkeypatch.setattr(Start, "feature_extractor", feature_extractor)
    num_train, num_valid = len(start.rows("train")), len(start.rows("valid"))
    monkeypatch.setattr("dipaco.routing._FEATURE_BATCH", 8)
    monkeypatch.setattr("dipaco.sharding.ROUTE_BATCH", 32)
    assert num_train > 32, "else they are one batch either way"
    (copied / "shards.stage.json").unlink()
    again = prepare_start(start.config, copied)
    assert sum(seen) == num_train + num_valid, "without a fit"
    seen.clear()
    (copied / "router.stage.json").unlink()
    (copied / "shards.stage.json").unlink()
    raw = [again.shard_file(path).read_bytes() for path in start.topology.paths]
    fitted = prepare_start(start.config, copied)
    assert sum(seen) == num_train + num_valid
    assert [fitted.shard_file(path).read_bytes() for path in start.topology.paths] == raw


def test_no_sequence_is_on_both_sides(start: Start) -> None:
    shards = [start.shard(path) for path in start.topology.paths]
    train = {row.tobytes() for shard in shards for row in shard.train}
    valid = {row.tobytes() for shard in shards for row in shard.valid}
    assert not train & valid


def test_finished_stages_are_not_done_again(start: Start, copied: Path) -> None:
    recorder = Recorder()
    again = prepare_start(start.config, copied, recorder)
    assert set(recorder.worked.values()) == {1}
    assert again.config == start.config


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda c: replace(c, outer=replace(c.outer, momentum=0.5)), set()),
        (
            lambda c: replace(c, dense_start=replace(c.dense_start, steps=3)),
            {"dense start", "states", "router", "shards"},
        ),
    ],
)
def test_a_change_redoes_only_what_depends_on_it(
    start: Start, copied: Path, change: Callable[[RunConfig], RunConfig], redone: set[str]
) -> None:
    recorder = Recorder()
    config = change(start.config)
    assert prepare_start(config, copied, recorder).config.fingerprint() == config.fingerprint()
    assert {stage for stage, calls in recorder.worked.items() if calls > 1} == redone


def test_an_interrupted_preparation_continues_to_the_same_bytes(start: Start, copied: Path) -> None:
    for file in ("router.safetensors", "start.json"):
        (copied / file).unlink()
    again = prepare_start(start.config, copied)
    for path in start.topology.paths:
        assert again.shard_file(path).read_bytes() == start.shard_file(path).read_bytes()
    assert again.router_file.read_bytes() == start.router_file.read_bytes()


def test_what_a_killed_preparation_was_writing_is_deleted(start: Start, copied: Path) -> None:
    folders = [copied, *(copied / name for name in ("sequences", "states", "shards"))]
    leftovers = [folder / ".file.1.partial" for folder in folders]
    for leftover in leftovers:
        leftover.touch()
    (copied / "shards.stage.json").unlink()
    prepare_start(start.config, copied)
    assert not any(leftover.exists() for leftover in leftovers)
    assert Start.load(copied).shard_tokens == start.shard_tokens


def test_a_start_whose_parts_were_replaced_in_part_is_none(start: Start, copied: Path) -> None:
    """Interrupted while it is prepared for another configuration, before any stage or amid them."""
    other = replace(start.config, dense_start=replace(start.config.dense_start, steps=3))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == interrupted_at:
            raise KeyboardInterrupt

    interrupted_at = "tokenizer"
    with pytest.raises(KeyboardInterrupt):
        prepare_start(other, copied, interrupt)
    assert Start.load(copied).config == start.config, "nothing was replaced"
    interrupted_at = "router"
    with pytest.raises(KeyboardInterrupt):
        prepare_start(other, copied, interrupt)
    with pytest.raises(ConfigError, match="no finished preparation"):
        Start.load(copied)
    recorder = Recorder()
    again = prepare_start(other, copied, recorder)
    assert {stage for stage, calls in recorder.worked.items() if calls > 1} == {"router", "shards"}
    assert Start.load(copied).config.fingerprint() == again.config.fingerprint()
    assert prepare_start(start.config, copied).router_file.read_bytes() == (
        start.router_file.read_bytes()
    )


def test_a_changed_corpus_or_checkpoint_is_refused_and_one_that_is_gone_is_not(
    start: Start, tmp_path: Path
) -> None:
    files = [Path(shutil.copy(file, tmp_path)) for file in start.config.corpus.files]
    checkpoint = tmp_path / "llama"
    export_llama(start.net(), start.tokenizer_file.read_bytes(), checkpoint)
    files.append(checkpoint / "model.safetensors")
    config = replace(
        start.config,
        corpus=replace(start.config.corpus, files=tuple(map(str, files[:-1]))),
        dense_start=replace(start.config.dense_start, checkpoint=str(checkpoint)),
    )
    directory = tmp_path / "start"
    check_sources(config, directory)
    files[0].write_text("as long as nothing was prepared")
    check_sources(config, directory)
    (directory / "tokenizer.stage.json").touch()
    for file in files:
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(ConfigError, match=f"{file} was changed") as caught:
            check_sources(config, directory)
        file.write_bytes(raw)
        check_sources(config, directory)  # the same bytes at another time
    files[0].write_bytes(b"?")
    files[1].unlink()
    shutil.rmtree(checkpoint)
    record = next(word for word in caught.value.hint.split() if word.endswith(".json"))
    Path(record).unlink()  # as the hint says
    check_sources(config, directory)


def test_an_unfinished_or_changed_preparation_is_refused(start: Start, copied: Path) -> None:
    with pytest.raises(ConfigError, match="no finished preparation"):
        Start.load(copied / "absent")
    changed = replace(start.config, seed=99)
    (copied / "run.toml").write_text(changed.to_toml())
    with pytest.raises(ConfigError, match="was changed"):
        Start.load(copied)


def test_shards_and_routers_refuse_other_bytes(start: Start) -> None:
    path = PathID((0, 0))
    raw = start.shard_file(path).read_bytes()
    model = start.config.model

    def read(raw: bytes, tokens: int = model.sequence_tokens, vocab: int = 384) -> Shard:
        return Shard.from_bytes(raw, path=path, sequence_tokens=tokens, vocab_size=vocab)

    assert np.array_equal(read(raw).train, start.shard(path).train)
    for wrong in (b"", raw[:-1], raw[:60], start.router_file.read_bytes()):
        with pytest.raises(BadBytes):
            read(wrong)
    with pytest.raises(BadBytes):
        read(raw, tokens=63)
    with pytest.raises(BadBytes):
        read(raw, vocab=200)
    router = start.router_file.read_bytes()
    with pytest.raises(BadBytes):
        router_from_bytes(router[:-4] + b"\xff" * 4, start.config)
    more = replace(start.config, topology=TopologyConfig(levels=(5,)))
    with pytest.raises(BadBytes):
        router_from_bytes(router, more)


def test_a_run_can_start_from_a_checkpoint(start: Start, tmp_path: Path) -> None:
    """Written for others and read again: the same network, tokenizer and configuration."""
    checkpoint = tmp_path / "llama"
    export_llama(start.net(), start.tokenizer_file.read_bytes(), checkpoint)
    model = RunConfig.from_dict(start.config.to_dict() | {"model": model_section(checkpoint)}).model
    assert model == start.config.model
    dense = replace(start.config.dense_start, checkpoint=str(checkpoint), steps=0)
    again = prepare_start(replace(start.config, model=model, dense_start=dense), tmp_path / "start")
    for module in start.topology.modules:
        expected = start.module_state(module).parameters
        assert torch.equal(again.module_state(module).parameters, expected)
    assert again.tokenizer_file.read_bytes() == start.tokenizer_file.read_bytes()


def test_a_checkpoint_that_is_not_there_is_a_config_error(start: Start, tmp_path: Path) -> None:
    dense = replace(start.config.dense_start, checkpoint=str(tmp_path / "absent"), steps=0)
    with pytest.raises(ConfigError, match="absent"):
        prepare_start(replace(start.config, dense_start=dense), tmp_path / "start")
