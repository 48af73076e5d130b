"""The commands that use a trained model, in one process: each would import torch anew."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from bootstrap.cli import main as bootstrap
from bootstrap.prepare import START_DIR
from dipaco.cli import main
from dipaco.config import RunConfig
from dipaco.early_stopping import keep_if_best
from dipaco.evaluate import NOTHING, Evaluation
from dipaco.preparation import check_sources
from dipaco.reference import ReferenceResult
from dipaco.start import Start
from dipaco.topology import PathID
from dipaco.trained import TrainedModel
from dipaco.training_commands import _print_tables
from dipaco.usage_commands import _as_json


def dipaco(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--threads", "1"])


@pytest.fixture(scope="module")
def trained_dir(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("usage")
    config = replace(
        tiny,
        corpus=replace(tiny.corpus, test_fraction=0.1),
        routing=replace(tiny.routing, router_fraction=0.1),
    )
    (directory / "run.toml").write_text(config.to_toml())
    done = dipaco("train", directory / "run.toml", "--dir", directory / "work", "--early-stopping")
    assert done.exit_code == 0, done.output
    return directory / "work"


def test_a_path_without_validation_text_has_no_perplexity(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = dict.fromkeys(start.topology.paths, Evaluation(nll_sum=1.0, num_tokens=1))
    scored[start.topology.paths[1]] = NOTHING
    result = ReferenceResult(
        states={}, digests={}, sharding=start.sharding, at_start=scored, at_end=scored
    )
    _print_tables(start, result, None)
    told = capsys.readouterr().out
    assert "inf" not in told
    assert told.count("2.72") == 2 * len(scored), "of three paths, and of the whole"


def test_evaluate_scores_the_whole_each_path_and_rerouted(trained_dir: Path) -> None:
    done = dipaco("evaluate", trained_dir, "--reroute", "8", "--reroute", "16", "--json")
    figures = json.loads(done.stdout)
    assert set(figures["perplexity"]) == {"0", "8", "16"}
    assert figures["round"] == 3
    assert set(figures["paths"]) <= {"0.0", "0.1", "1.0", "1.1"}
    assert 1 < min(figures["paths"].values()) <= figures["perplexity"]["0"] < 1000
    table = dipaco("evaluate", trained_dir, "--early-stopped", "--split", "valid").stdout
    assert "once per sequence" in table


def test_generate_streams_a_continuation_of_one_path(trained_dir: Path) -> None:
    arguments = ("generate", trained_dir, "one two three", "--max-tokens", "12", "--seed", "3")
    first, second = dipaco(*arguments), dipaco(*arguments)
    assert first.stdout.startswith("one two three")
    assert len(first.stdout) > len("one two three\n")
    assert first.stdout == second.stdout
    assert "0 switches]" in first.stderr
    chosen = dipaco(*arguments, "--path", "1.0", "--early-stopped")
    assert "[path 1.0; 0 switches]" in chosen.stderr


@pytest.fixture(scope="module")
def stopped_dir(trained_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but path 1.0 did best after round 1, when it was of zeros."""
    directory = tmp_path_factory.mktemp("stopped") / "work"
    model = TrainedModel.load(shutil.copytree(trained_dir, directory))
    best = model.best(2, early_stopped=True)
    assert best is not None
    valid = model.sharding.shard(PathID((1, 0))).valid
    assert keep_if_best(
        model.files.early_stopped_file(PathID((1, 0))),
        {module: torch.zeros_like(vector) for module, vector in best.parameters.items()},
        Evaluation(nll_sum=0.0, num_tokens=1),
        rows=valid[: model.config.rounds.eval_sequences],
        round_number=1,
    )
    return directory


def test_paths_are_used_as_they_did_best_unless_the_last_are_wanted(
    stopped_dir: Path, tmp_path: Path
) -> None:
    write = ("generate", stopped_dir, "one two three", "--max-tokens", "12", "--path")
    best, last = dipaco(*write, "1.0"), dipaco(*write, "1.0", "--last")
    assert best.stdout != last.stdout
    assert "[path 1.0 after round 1; 0 switches]" in best.stderr
    assert "[path 1.0; 0 switches]" in last.stderr
    assert "[path 0.0; 0 switches]" in dipaco(*write, "0.0").stderr, "its best is the last"
    written = CliRunner().invoke(main, ["export", str(stopped_dir), "1.0", str(tmp_path / "best")])
    assert "path 1.0 after round 1, where it did best, is in" in written.stdout
    arguments = ["export", str(stopped_dir), "1.0", str(tmp_path / "last"), "--last"]
    assert "path 1.0 after round 3 is in" in CliRunner().invoke(main, arguments).stdout
    weights = [tmp_path / name / "model.safetensors" for name in ("best", "last")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_evaluate_says_which_paths_it_scored(stopped_dir: Path) -> None:
    best = dipaco("evaluate", stopped_dir, "--json")
    last = dipaco("evaluate", stopped_dir, "--json", "--last")
    assert json.loads(best.stdout)["early_stopped"] == {"1.0": 1}
    assert json.loads(last.stdout)["early_stopped"] == {}
    found = [json.loads(done.stdout)["paths"]["1.0"] for done in (best, last)]
    assert found[0] > 2 * found[1], "zeros predict nothing"
    told = "1 of these 4 paths as they did best on validation text; --last takes all after round 3"
    assert told in dipaco("evaluate", stopped_dir).stdout
    assert "--last" not in dipaco("evaluate", stopped_dir, "--last").stdout


def test_the_best_of_a_path_is_asked_for_where_it_was_kept_only(trained_dir: Path) -> None:
    model = TrainedModel.load(trained_dir)
    kept = model.files.early_stopped_file(PathID((0, 0)))
    raw = kept.read_bytes()
    kept.unlink()
    try:
        assert model.best(0, early_stopped=None) is None
        failed = dipaco("generate", trained_dir, "one", "--path", "0.0", "--early-stopped")
        assert failed.exit_code == 1
        assert "--early-stopping" in failed.stderr.split("hint: ")[1]
    finally:
        kept.write_bytes(raw)


def test_the_token_level_router_is_trained_once_and_used(trained_dir: Path) -> None:
    missing = dipaco("generate", trained_dir, "one two", "--token-router")
    assert missing.exit_code == 1
    assert "dipaco train-router" in missing.stderr.split("hint: ")[1]
    assert dipaco("train-router", trained_dir, "--steps", "2").exit_code == 0
    done = dipaco("evaluate", trained_dir, "--reroute", "16", "--token-router", "--json")
    assert set(json.loads(done.stdout)["perplexity"]) == {"0", "16"}
    arguments = ("generate", trained_dir, "one two", "--token-router", "--reroute", "4")
    told = dipaco(*arguments, "--max-tokens", "9").stderr
    assert "switches]" in told
    assert "train-router" not in told


def test_a_token_level_router_of_another_round_is_not_taken_in_silence(
    trained_dir: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(trained_dir, tmp_path / "work"))
    assert dipaco("train-router", directory, "--steps", "1").exit_code == 0
    latest = TrainedModel.load(directory).files.directory
    latest.rename(latest.with_name("round-000007"))
    for arguments in (("evaluate", directory), ("generate", directory, "one two")):
        told = dipaco(*arguments, "--token-router", "--reroute", "16").stderr
        assert "as they were after round 3, not 7; `dipaco train-router" in told


def test_export_writes_one_path_and_only_where_nothing_is(
    trained_dir: Path, tmp_path: Path
) -> None:
    arguments = ["export", str(trained_dir), "0.1", str(tmp_path / "path")]
    done = CliRunner().invoke(main, arguments)
    assert "path 0.1 after round 3" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "path").iterdir()
    }
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--token-router"),
        ("generate", "one", "--path", "0.0", "--reroute", "4"),
        ("generate", "one", "--path", "0.0", "--token-router"),
    ],
)
def test_an_option_without_effect_is_wrong_usage(
    trained_dir: Path, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    refused = dipaco(command, trained_dir, *rest)
    assert refused.exit_code == 2
    assert "no effect with" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a\udcff",), "PROMPT': not UTF-8"),
        (("one", "--seed", str(2**64)), "--seed"),
        (("one", "--temperature", "nan"), "the temperature is nan"),
    ],
)
def test_what_no_text_can_be_made_of_is_refused(
    trained_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = dipaco("generate", trained_dir, *arguments)
    assert refused.exit_code in (1, 2)
    assert message in refused.stderr
    assert not refused.stdout


def test_wrong_arguments_say_what_to_do(trained_dir: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("generate", trained_dir, "one", "--path", "7.7"), "no path '7.7'"),
        (("generate", trained_dir, ""), "prompt is empty"),
        (("evaluate", tmp_path), "no finished preparation"),
    ]:
        failed = dipaco(*arguments)
        assert failed.exit_code == 1
        error, hint = failed.stderr.split("\n\nhint: ")
        assert message in error
        assert hint.strip()


def test_a_corpus_that_was_changed_is_not_trained_on_as_it_was(
    tiny: RunConfig, tmp_path: Path
) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "run.toml"
    config = replace(tiny, corpus=replace(tiny.corpus, files=(str(text),)))
    file.write_text(config.to_toml())
    for directory in (tmp_path / "work", tmp_path / "run" / START_DIR):
        text.write_text("one two three")
        check_sources(config, directory)
        (directory / "tokenizer.stage.json").touch()
        text.write_text("one two three four")
    for program, arguments in (
        (main, ["train", str(file), "--dir", str(tmp_path / "work")]),
        (bootstrap, ["prepare", str(file), str(tmp_path / "run")]),
    ):
        refused = CliRunner().invoke(program, arguments)
        assert refused.exit_code == 1
        assert f"error: {text} was changed after" in refused.stderr


def test_what_was_not_measured_is_null_in_json() -> None:
    assert _as_json(NOTHING) is None
