"""Dense and 2x2 trainings against OpenDiPaCo's, on the same rows, and the speed of an inner step.

OpenDiPaCo (github.com/MasonFlint44/OpenDiPaCo, MIT) is another implementation of the same paper,
and comes with a comparison of its own, `run_comparison`: a dense model and K x K paths, both from
random weights, sequences given to paths by k-means and, at test time, by a classifier fitted to
held-out ones. It is called here as it is, with our training rows as its documents, our router
rows as its held-out ones and our test rows as its test set, once per learning rate. Only full rows
are tested, because it knows no padding; the first 32 tokens of a row count on neither side. Its
embedding and output matrix are two, so that its paths are a quarter larger than ours.

Ours take 300 of the steps as dense start, which four paths share, and the rest in rounds.

    pip install --no-deps git+https://github.com/MasonFlint44/OpenDiPaCo@237d18b
    python -m benchmarks.opendipaco [--json FILE]
"""

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.inner_step import Step, a_shard, paired, peer_step, run_turns
from benchmarks.quality.plan import base_config, varied
from dipaco.config import RunConfig
from dipaco.dense import train_dense
from dipaco.evaluate import total
from dipaco.preparation import prepare_start
from dipaco.reference import train
from dipaco.shards import Rows, Shard
from dipaco.start import Start
from dipaco.topology import Topology
from dipaco.trained import TrainedModel, evaluate_model, training_directory

try:
    from opendipaco import BackboneConfig, DiLoCoConfig, DiPaCoConfig
    from opendipaco.model import build_module_bank, build_path_model
    from opendipaco.optim.diloco import make_inner_optimizer
    from opendipaco.train.loop import run_inner_steps
    from opendipaco.validation import run_comparison
except ImportError as error:
    raise SystemExit(f"{error}; how to install it stands at the head of {__file__}") from error

LEARNING_RATES = (4e-4, 1e-3, 3e-3)  # the first is OpenDiPaCo's own
NUM_TURNS = 60

Figures = dict[str, float]


def our_config(num_rounds: int) -> RunConfig:
    """The 2x2 run of `benchmarks.quality`, with another number of rounds."""
    return varied(base_config("cpu", None), rounds={"num_rounds": num_rounds})


def full_test_rows(start: Start) -> Rows:
    """The test rows that have no padding."""
    rows = start.rows("test")
    return np.asarray(rows[(rows != start.config.model.pad_token).all(axis=1)])


def train_ours_dense(directory: Path) -> Figures:
    """One path of ours for all the steps, the dense start included."""
    torch.set_num_threads(1)
    start = Start.load(directory)
    trainer = train_dense(start, start.config.rounds.total_steps)
    return {"dense": trainer.evaluate_rows(full_test_rows(start)).perplexity}


def train_ours_paths(directory: Path) -> Figures:
    """Four paths of ours."""
    torch.set_num_threads(1)
    start = Start.load(directory)
    rounds = start.config.rounds
    train(start, training_directory(directory, start.config), num_rounds=rounds.num_rounds)
    found = evaluate_model(TrainedModel.load(directory), full_test_rows(start))
    return {"2x2": total(found).perplexity}


def train_theirs(directory: Path, learning_rate: float) -> Figures:
    """A dense model and four paths of OpenDiPaCo's, by its own comparison."""
    torch.set_num_threads(1)
    start = Start.load(directory)
    config = start.config
    documents = {
        split: [_document(row, config.model.pad_token) for row in start.rows(split)]
        for split in ("train", "router")
    }
    num_held_out, num_training = len(documents["router"]), len(documents["train"])
    held_out_share = (num_held_out + 0.5) / (num_held_out + num_training)  # it rounds down
    inner = config.rounds.inner_steps
    found = run_comparison(
        backbone_of(config),
        documents["router"] + documents["train"],
        [_document(row, config.model.pad_token) for row in full_test_rows(start)],
        DiLoCoConfig(
            inner_steps=inner,
            inner_lr=learning_rate,
            inner_warmup_steps=config.dense_start.warmup_steps,
        ),
        rounds=(config.dense_start.steps + config.rounds.total_steps) // inner,
        batch_size=config.inner.batch_sequences,
        seq_len=config.model.sequence_tokens,
        eval_len=config.model.sequence_tokens,
        router_holdout=held_out_share,
    )
    return {
        "dense": found["dense_ppl"],
        "2x2": found["dipaco_ppl"],
        "parameters": found["params_per_path"],
    }


def _document(row: Rows, pad_token: int) -> torch.Tensor:
    return torch.from_numpy(row[row != pad_token].astype(np.int64))


def backbone_of(config: RunConfig) -> BackboneConfig:
    """The shape of our paths in OpenDiPaCo's words."""
    model = config.model
    return BackboneConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.ffn_width,
        layers_per_level=[model.num_blocks // 2] * 2,
        max_position_embeddings=model.sequence_tokens,
    )


def their_step(config: RunConfig, shard: Shard) -> Step:
    """An inner step of OpenDiPaCo."""
    theirs = DiPaCoConfig(backbone=backbone_of(config), level_sizes=[2, 2])
    diloco = DiLoCoConfig()
    path = theirs.build_topology().path_from_index(0)
    net = build_path_model(theirs, path, build_module_bank(theirs, seed=0))
    optimizer = make_inner_optimizer(net, diloco)
    rows = torch.from_numpy(shard.train.astype(np.int64))
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> float:
        return run_inner_steps(
            net,
            optimizer,
            rows,
            config.inner.batch_sequences,
            generator,
            inner_steps=1,
            total_steps=None,
            base_step=number,
            diloco=diloco,
            device="cpu",
        )

    return step


def compare_speed(config: RunConfig) -> Figures:
    """Inner steps of both on one thread, in turns."""
    torch.set_num_threads(1)
    shard = a_shard(config, Topology.of(config))
    cpu = torch.device("cpu")
    steps = {"ours": peer_step(config, shard, cpu), "theirs": their_step(config, shard)}
    seconds = run_turns(steps, NUM_TURNS, 1, cpu)
    tokens = config.inner.batch_sequences * config.model.sequence_tokens
    return {
        "speed_ratio": paired(seconds["theirs"], seconds["ours"]),
        **{
            f"{name}_tokens_per_second": tokens / float(np.median(times))
            for name, times in seconds.items()
        },
    }


def compare_quality(config: RunConfig, workers: int) -> dict[str, Figures]:
    """Perplexities on the full test rows, by training; prints each as it is known."""
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        directory = Path(name)
        click.echo("preparing text, tokenizer and dense start ...")
        prepare_start(config, directory)
        waiting = {
            pool.submit(train_theirs, directory, rate): f"OpenDiPaCo, {rate:g}"
            for rate in LEARNING_RATES
        }
        ours: tuple[Callable[[Path], Figures], ...] = (train_ours_paths, train_ours_dense)
        waiting |= {pool.submit(training, directory): "ours" for training in ours}
        figures: dict[str, Figures] = {}
        for done in as_completed(waiting):
            found = figures.setdefault(waiting[done], {})
            found |= done.result()
            shown = ", ".join(f"{key} {value:,.2f}" for key, value in done.result().items())
            click.echo(f"{waiting[done]}: {shown}")
    return figures


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
def main(rounds: int, workers: int, json_file: Path | None) -> None:
    """Compare perplexity and speed with OpenDiPaCo's."""
    config = our_config(rounds)
    speed = compare_speed(config)
    figures = compare_quality(config, workers)
    table = Table("training", "dense", "2x2", "2x2 / dense")
    for name, found in sorted(figures.items(), key=lambda item: item[0] != "ours"):
        ratio = found["2x2"] / found["dense"]
        table.add_row(name, f"{found['dense']:.2f}", f"{found['2x2']:.2f}", f"{ratio:.3f}")
    Console().print(table)
    ours, theirs = speed["ours_tokens_per_second"], speed["theirs_tokens_per_second"]
    click.echo(
        f"inner step, one thread: {ours:,.0f} tokens/s, OpenDiPaCo {theirs:,.0f}; "
        f"{speed['speed_ratio']:.2f} times as fast"
    )
    if json_file is not None:
        json_file.write_text(json.dumps({"perplexity": figures, "speed": speed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
