"""Whole runs on a GPU: one machine by the command line, and two peers over libp2p."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from dipaco.cli import main
from dipaco.config import RunConfig
from dipaco.dense import dense_trainer
from dipaco.evaluate import total
from dipaco.preparation import prepare_start
from dipaco.reference import Options, train
from dipaco.start import Start
from tests.swarm.place import Place

pytestmark = pytest.mark.timeout(300)

ON_GPU = ["--device", "cuda"]


def dipaco(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def config(tiny: RunConfig) -> RunConfig:
    """With a new sharding after the first round, and text to test on."""
    routing = replace(tiny.routing, method="discriminative", phases=(1,), router_fraction=0.1)
    return replace(
        tiny,
        routing=routing,
        corpus=replace(tiny.corpus, test_fraction=0.1),
        outer=replace(tiny.outer, wire_format="int8"),
    )


@pytest.fixture(scope="module")
def trained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu") / "run"
    (directory.parent / "run.toml").write_text(config.to_toml())
    arguments = ["--dir", directory, *ON_GPU, "--early-stopping", "--side-by-side", "2"]
    dipaco("train", directory.parent / "run.toml", *arguments)
    return directory


def test_every_command_works_on_a_gpu(trained: Path, tmp_path: Path) -> None:
    dipaco("train-router", trained, "--steps", "5", *ON_GPU)
    figures = {}
    for device in ("cuda", "cpu"):
        arguments = ["--reroute", "32", "--json", "--device", device]
        figures[device] = json.loads(dipaco("evaluate", trained, *arguments).stdout)
    ours, theirs = (
        [float(value) for value in re.findall(r"\d+\.\d+", json.dumps(figures[device]))]
        for device in ("cuda", "cpu")
    )
    assert len(ours) > 3
    assert ours == pytest.approx(theirs, rel=0.02)
    dipaco("evaluate", trained, "--reroute", "32", "--token-router", *ON_GPU)
    # In float32 on both, so the likeliest tokens are the same.
    said = ["generate", trained, "one two three", "--max-tokens", "20", "--temperature", "0"]
    assert dipaco(*said, *ON_GPU).stdout == dipaco(*said).stdout
    dipaco(*said, "--reroute", "4", "--token-router", *ON_GPU)


def test_a_start_made_on_a_gpu_is_as_good(start: Start, tmp_path: Path) -> None:
    on_gpu = prepare_start(start.config, tmp_path, device="cuda")
    scored = []
    for made in (on_gpu, start):
        trainer = dense_trainer(made, 1)
        scored.append(trainer.evaluate_rows(start.rows("valid")[:64]).perplexity)
    assert scored[0] == pytest.approx(scored[1], rel=0.02)


def test_replicas_and_compiled_steps_train(config: RunConfig, tmp_path: Path) -> None:
    start = prepare_start(config, tmp_path, device="cuda")
    options = Options(replicas=2, compiled=True)
    result = train(start, tmp_path / "training", num_rounds=1, device="cuda", options=options)
    assert total(result.at_end).perplexity < total(result.at_start).perplexity


@pytest.fixture
def place(config: RunConfig, tmp_path: Path) -> Iterator[Place]:
    rounds = replace(config.rounds, num_rounds=100, round_seconds=6.0)
    routing = replace(config.routing, method="kmeans", phases=())
    made = Place(tmp_path, replace(config, rounds=rounds, routing=routing))
    yield made
    made.close()


@pytest.mark.swarm
def test_peers_train_a_run_on_a_gpu(place: Place) -> None:
    assert torch.cuda.is_available()
    bootstrap = place.serve()
    peers = [
        place.join(name, bootstrap.address, *ON_GPU, *more)
        for name, more in (("one", []), ("two", ["--optimizer", "adamw8bit"]))
    ]
    place.until(lambda: all(len(peer.seen("round")) >= 3 for peer in peers), within=150)
    for peer in peers:
        # They take turns with four paths, whose losses differ; before any training it is 5.8.
        losses = [entry["loss"] for entry in peer.seen("round") if entry["loss"] is not None]
        assert max(losses) < 4
        assert peer.seen("contributed")
        assert peer.seen("version")
        assert "cuda:0" in peer.log
    assert "adamw8bit" in peers[1].log
    assert [peer.leave() for peer in peers] == [0, 0]
