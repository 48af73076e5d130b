"""One training of the plan, and what it is worth; kept, so that it is not done twice."""

# ruff: noqa: N806 - arrays carry their shape in their name: N sequences, P paths

import json
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dipaco
from benchmarks.quality.flops import training_flops_per_token
from benchmarks.quality.plan import Experiment
from benchmarks.quality.synchronous import train_synchronously
from dipaco.checkpoint import link_or_copy, write_atomically
from dipaco.config import RunConfig
from dipaco.dense import dense_trainer
from dipaco.evaluate import total
from dipaco.inner import PathTrainer
from dipaco.model import PathNet
from dipaco.preparation import prepare_start
from dipaco.reference import train
from dipaco.rerouting import boundaries, choices_of_router, evaluate_choices
from dipaco.rounds import RoundReport
from dipaco.routing import ranking
from dipaco.shards import Rows, Shard
from dipaco.start import Start
from dipaco.trained import (
    TrainedModel,
    evaluate_model,
    sample,
    train_token_router_of,
    training_directory,
)

TEST_SEQUENCES = 512
CURVE_SEQUENCES = 128
_MAX_CONFUSION_PATHS = 8

Figures = dict[str, Any]


def prepare(config: RunConfig, directory: Path, device: str, base: Path | None = None) -> Start:
    """The start of a run; stages that are finished in `base` are not done again."""
    torch.set_num_threads(1)
    if base is not None and not directory.exists():
        shutil.copytree(base, directory, copy_function=link_or_copy)
    return prepare_start(config, directory, device=device)


def run(experiment: Experiment, base: Path, directory: Path, device: str) -> Figures:
    """Train and score one experiment; figures of an earlier call are returned at once."""
    file = directory / "figures.json"
    key = f"{experiment} {device} {_code_digest()}"
    if file.exists() and json.loads(file.read_text())["key"] == key:
        found: Figures = json.loads(file.read_text())
        return found
    shutil.rmtree(directory, ignore_errors=True)
    start = prepare(experiment.config, directory, device, base)
    measure = {"paths": _paths, "dense": _dense, "synchronous": _synchronous}[experiment.kind]
    flops = training_flops_per_token(experiment.config.model)
    figures = {
        "key": key,
        "steps": experiment.num_steps,
        "tokens": experiment.tokens,
        "flops": flops * experiment.tokens,
        "epochs": _epochs(experiment, start),
        **measure(experiment, start, device),
    }
    shutil.rmtree(directory / "shards")  # the figures are what is kept
    write_atomically(file, (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def _code_digest() -> str:
    """Of what the figures come from: other code, other figures."""
    digest = sha256()
    for package in (Path(dipaco.__file__).parent, Path(__file__).parent):
        for file in sorted(package.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


class _Curve:
    """Perplexity over steps, seconds of training and FLOPs; the measuring itself not counted.

    Seconds of the processor: trainings run side by side, and what else the machine does shall not
    count. A GPU is waited for, which is not processor time, so there it is the clock.
    """

    def __init__(self, experiment: Experiment, device: str) -> None:
        self.points: list[tuple[int, float, float, float]] = []
        self._flops_per_step = (
            training_flops_per_token(experiment.config.model)
            * experiment.tokens
            / experiment.num_steps
        )
        self._is_on_gpu = device != "cpu"
        self._clock = time.monotonic if self._is_on_gpu else time.process_time
        self._begun = self._clock()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        """Of training, so far."""
        if self._is_on_gpu:
            torch.cuda.synchronize()  # what is queued has not been trained yet
        return self._clock() - self._begun - self._paused

    def add(self, num_steps: int, perplexity: Callable[[], float]) -> None:
        """A point after so many steps of each path."""
        seconds = self.seconds
        value = perplexity()
        self._paused += self._clock() - self._begun - self._paused - seconds
        self.points.append((num_steps, seconds, self._flops_per_step * num_steps, value))


def _epochs(experiment: Experiment, start: Start) -> float:
    """How often the training rows are gone through, on the average of the shards."""
    seats = experiment.options.replicas
    num_rows = len(start.rows("train"))
    if experiment.kind != "dense":
        seats *= start.topology.num_paths
        num_rows = sum(len(start.shard(path).train) for path in start.topology.paths)
    num_sequences = seats * experiment.num_steps * experiment.config.inner.batch_sequences
    return num_sequences / num_rows


def _paths(experiment: Experiment, start: Start, device: str) -> Figures:
    config = experiment.config
    curve = _Curve(experiment, device)
    ratios: list[float] = []
    shown = sample(start, "valid", CURVE_SEQUENCES)

    def perplexity() -> float:
        """Of the sequences that every curve is about, each through the path of its prefix."""
        return total(evaluate_model(TrainedModel.load(start.directory, device), shown)).perplexity

    def on_round(report: RoundReport) -> None:
        curve.add(report.round * config.rounds.inner_steps, perplexity)
        ratios.append(float(np.mean(list(report.norm_ratios.values()))))

    train(
        start,
        training_directory(start.directory, config),
        num_rounds=config.rounds.num_rounds,
        device=device,
        options=experiment.options,
        on_round=on_round,
    )
    seconds = curve.seconds
    model = TrainedModel.load(start.directory, device)
    rows = sample(start, "test", TEST_SEQUENCES)
    figures: Figures = {
        "ppl": total(evaluate_model(model, rows)).perplexity,
        "train_seconds": seconds,
        "curve": curve.points,
        "norm_ratio": ratios,
        "shard_tokens": list(model.sharding.shard_tokens.values()),
    }
    for every in experiment.reroute:
        figures[f"ppl_rerouted_{every}"] = total(
            evaluate_model(model, rows, every=every)
        ).perplexity
    if config.topology.num_paths == 1:
        figures["ppl_rerouted_32"] = figures["ppl"]  # there is but one path
    if experiment.options.early_stopping:
        figures["ppl_early_stopped"] = total(
            evaluate_model(model, rows, early_stopped=True)
        ).perplexity
    if experiment.token_router_steps:
        train_token_router_of(model, experiment.token_router_steps)
        for every in experiment.reroute:
            found = evaluate_model(model, rows, every=every, by_token=True)
            figures[f"ppl_token_router_{every}"] = total(found).perplexity
    if 1 < config.topology.num_paths <= _MAX_CONFUSION_PATHS:
        figures |= _confusion(model, rows)
    return figures


def _confusion(model: TrainedModel, rows: Rows) -> Figures:
    """How often the router names the path that predicts best, and what that would be worth."""
    config, topology = model.config, model.start.topology
    scores = []
    for path in topology.paths:
        shard = Shard(path=path, train=rows, valid=rows)
        trainer = PathTrainer(config, topology, path, shard, device=model.device)
        for module in trainer.modules:
            trainer.write_module(module, model.files.state(module).parameters)
        scores.append(trainer.score_rows(rows))
    scores_NP = torch.stack(scores, dim=1)
    best_N = scores_NP.argmax(dim=1).numpy()
    chosen_N = ranking(
        model.router,
        rows,
        model.features,
        prefix_tokens=config.routing.prefix_tokens,
        num_best=1,
    )[:, 0]
    counts = np.zeros((topology.num_paths, topology.num_paths), dtype=np.int64)
    np.add.at(counts, (best_N, chosen_N), 1)
    counted = (rows[:, config.routing.prefix_tokens :] != config.model.pad_token).sum()
    return {
        "confusion": counts.tolist(),
        "router_accuracy": float((best_N == chosen_N).mean()),
        "ppl_best_path": float(np.exp(-scores_NP.max(dim=1).values.double().sum() / counted)),
    }


def _dense(experiment: Experiment, start: Start, device: str) -> Figures:
    curve = _Curve(experiment, device)
    trainer = dense_trainer(start, experiment.num_steps, device=device)
    shown = sample(start, "valid", CURVE_SEQUENCES)
    every = experiment.config.rounds.inner_steps * experiment.steps_factor
    for step in range(experiment.num_steps):
        trainer.train_step(step)
        if (step + 1) % every == 0:
            curve.add(step + 1, lambda: trainer.evaluate_rows(shown).perplexity)
    rows = sample(start, "test", TEST_SEQUENCES)
    perplexity = trainer.evaluate_rows(rows).perplexity
    return {
        "ppl": perplexity,
        "ppl_rerouted_32": perplexity,  # there is but one path
        "train_seconds": curve.seconds,
        "curve": curve.points,
    }


def _synchronous(experiment: Experiment, start: Start, device: str) -> Figures:
    curve = _Curve(experiment, device)
    nets = train_synchronously(start, experiment.num_steps, device)
    seconds = curve.seconds
    rows = sample(start, "test", TEST_SEQUENCES)
    return {
        "ppl": _synchronous_perplexity(start, nets, rows, every=0, device=device),
        "ppl_rerouted_32": _synchronous_perplexity(start, nets, rows, every=32, device=device),
        "train_seconds": seconds,
        "curve": [],
    }


def _synchronous_perplexity(
    start: Start, nets: list[PathNet], rows: Rows, *, every: int, device: str
) -> float:
    prefix_tokens, model = start.config.routing.prefix_tokens, start.config.model
    at = boundaries(prefix_tokens=prefix_tokens, sequence_tokens=model.sequence_tokens, every=every)
    features = start.feature_extractor(device)
    choices = choices_of_router(start.router(), rows, features, prefix_tokens=prefix_tokens, at=at)
    scored = evaluate_choices(
        lambda number: nets[number], rows, choices, at=at, model=model, device=device
    )
    return total(scored).perplexity
