"""The commands that use a trained model, in one process: each would import torch anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dipaco.cli import main
from dipaco.config import RunConfig


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


def test_the_token_level_router_is_trained_once_and_used(trained_dir: Path) -> None:
    missing = dipaco("generate", trained_dir, "one two", "--token-router")
    assert missing.exit_code == 1
    assert "dipaco train-router" in missing.stderr.split("hint: ")[1]
    assert dipaco("train-router", trained_dir, "--steps", "2").exit_code == 0
    done = dipaco("evaluate", trained_dir, "--reroute", "16", "--token-router", "--json")
    assert set(json.loads(done.stdout)["perplexity"]) == {"0", "16"}
    arguments = ("generate", trained_dir, "one two", "--token-router", "--reroute", "4")
    assert "switches]" in dipaco(*arguments, "--max-tokens", "9").stderr


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
