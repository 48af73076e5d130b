"""`dipaco evaluate`, `generate` and `export`: a trained model in use, path by path."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dipaco.command_line import Command
from dipaco.command_options import (
    device_option,
    early_stopped_option,
    open_device,
    threads_option,
    token_router_option,
    trained_dir,
)
from dipaco.imports import heavy_imports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dipaco.evaluate import Evaluation
    from dipaco.trained import TrainedModel


@click.command(cls=Command)
@trained_dir
@click.option(
    "--split",
    type=click.Choice(["test", "valid"]),
    default="test",
    show_default=True,
    help="Text that nothing was trained on; of `valid`, early stopping has seen a part.",
)
@click.option(
    "--reroute",
    "every",
    type=click.IntRange(1),
    multiple=True,
    metavar="W",
    help="Also choose the path anew every W tokens. May be given several times.",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    metavar="N",
    help="Score at most so many sequences, evenly spread over the text.",
)
@token_router_option
@early_stopped_option
@click.option("--json", "as_json", is_flag=True, help="Print figures for programs.")
@device_option
@threads_option
def evaluate(  # noqa: PLR0913 - one parameter per option
    directory: Path,
    split: str,
    every: "tuple[int, ...]",
    max_sequences: int,
    token_router: bool,
    early_stopped: bool | None,
    as_json: bool,
    device_name: str,
    threads: int,
) -> None:
    """Perplexity of a trained model: the whole, each path, and re-routed.

    DIR is what `dipaco train --dir` filled. The first tokens of a sequence, which choose its
    path, are not counted. Paths are loaded one after another.
    """
    if token_router and not every:
        raise click.UsageError("--token-router has no effect without --reroute")
    with heavy_imports():
        from rich.console import Console

        from dipaco.evaluate import total
        from dipaco.progress import StageBars, progress_bars
        from dipaco.trained import TrainedModel, evaluate_model, sample

    device = open_device(device_name, threads)
    model = TrainedModel.load(directory, device)
    if token_router:
        _say_if_outdated(model)
    rows = sample(model.start, "valid" if split == "valid" else "test", max_sequences)
    results = {}
    with progress_bars(Console(stderr=True)) as progress:
        bars = StageBars(progress)
        for interval in (0, *every):
            results[interval] = evaluate_model(
                model,
                rows,
                every=interval,
                by_token=token_router and interval > 0,
                early_stopped=early_stopped,
                on_path=bars.update,
            )
    topology = model.start.topology
    numbers = sorted({number for result in results.values() for number in result})
    stopped = _early_stopped_after(model, numbers, early_stopped)
    if as_json:
        figures = {
            "round": model.round,
            "early_stopped": {str(topology.path_at(n)): round_ for n, round_ in stopped.items()},
            "perplexity": {str(n): _as_json(total(result)) for n, result in results.items()},
            "tokens": total(results[0]).num_tokens,
            "paths": {
                str(topology.path_at(number)): _as_json(evaluation)
                for number, evaluation in results[0].items()
            },
        }
        click.echo(json.dumps(figures, indent=1))
    else:
        _print_evaluations(model, results)
        if stopped:
            click.echo(
                f"{len(stopped)} of these {len(numbers)} paths as they did best on validation "
                f"text; --last takes all after round {model.round}"
            )


def _as_json(evaluation: "Evaluation") -> float | None:
    """JSON knows no infinite numbers."""
    return evaluation.perplexity if math.isfinite(evaluation.perplexity) else None


def _say_if_outdated(model: "TrainedModel") -> None:
    of_round = int(model.token_router.round)
    if of_round != model.round:
        click.echo(
            f"[the token-level router knows the paths as they were after round {of_round}, not "
            f"{model.round}; `dipaco train-router {model.start.directory}` makes a new one]",
            err=True,
        )


def _early_stopped_after(
    model: "TrainedModel", numbers: "Iterable[int]", early_stopped: bool | None
) -> dict[int, int]:
    """Which of these paths are not taken as they are last, and after which round they are."""
    found = {number: model.best(number, early_stopped) for number in numbers}
    return {n: best.round for n, best in found.items() if best and best.round != model.round}


def _print_evaluations(model: "TrainedModel", results: "dict[int, dict[int, Evaluation]]") -> None:
    from rich.console import Console
    from rich.table import Table

    from dipaco.evaluate import total

    names = ["once per sequence", *(f"every {interval} tokens" for interval in results if interval)]
    table = Table("path", "tokens", *names, title=f"perplexity after round {model.round}")
    numbers = sorted({number for result in results.values() for number in result})
    for number in numbers:
        cells = [
            f"{result[number].perplexity:.2f}" if number in result else "-"
            for result in results.values()
        ]
        tokens = f"{results[0][number].num_tokens:,}" if number in results[0] else "0"
        table.add_row(str(model.start.topology.path_at(number)), tokens, *cells)
    table.add_section()
    cells = [f"{total(result).perplexity:.2f}" for result in results.values()]
    table.add_row("all", f"{total(results[0]).num_tokens:,}", *cells)
    Console().print(table)


def _as_text(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("not UTF-8", context, parameter) from error
    return value


@click.command(cls=Command)
@trained_dir
@click.argument("prompt", callback=_as_text)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0.0),
    default=0.8,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--path", "path_name", metavar="PATH", help="Use this path instead of routing.")
@click.option(
    "--reroute", "every", type=click.IntRange(1), metavar="W", help="Choose anew every W tokens."
)
@token_router_option
@early_stopped_option
@device_option
@threads_option
def generate(  # noqa: PLR0913 - one parameter per option
    directory: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    path_name: str | None,
    every: int | None,
    token_router: bool,
    early_stopped: bool | None,
    device_name: str,
    threads: int,
) -> None:
    """Continue PROMPT: the router chooses a path, which is loaded and writes.

    DIR is what `dipaco train --dir` filled. Text goes to stdout as it comes, which paths wrote it
    to stderr.
    """
    if path_name is not None and (every or token_router):
        raise click.UsageError("--reroute and --token-router have no effect with --path")
    with heavy_imports():
        from dipaco.generate import generate as tokens_of
        from dipaco.generate import stream_text
        from dipaco.trained import TrainedModel

    model = TrainedModel.load(directory, open_device(device_name, threads))
    tokenizer = model.start.tokenizer()
    prompt_tokens = tokenizer.encode(prompt)
    tokens = tokens_of(
        prompt_tokens,
        net_of=lambda number: model.net(number, early_stopped=early_stopped),
        choose=_chooser(model, path_name, token_router),
        reroute_every=every or 0,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        end_token=model.config.model.end_token,
    )
    click.echo(prompt, nl=False)
    for text in stream_text(prompt_tokens, tokens, tokenizer):
        click.echo(text, nl=False)
    click.echo()
    stopped = _early_stopped_after(model, tokens.paths, early_stopped)
    taken = ", ".join(
        f"{model.start.topology.path_at(number)}"
        + (f" after round {stopped[number]}" if number in stopped else "")
        for number in tokens.paths
    )
    click.echo(f"[path {taken}; {tokens.num_switches} switches]", err=True)


def _chooser(
    model: "TrainedModel", path_name: str | None, token_router: bool
) -> "Callable[[Sequence[int]], int]":
    if path_name is not None:
        number = model.start.topology.path_index(model.path(path_name))
        return lambda tokens: number
    if token_router:
        _say_if_outdated(model)
        return model.token_router.next_path
    return model.choose


@click.command(cls=Command)
@trained_dir
@click.argument("path_name", metavar="PATH")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path), metavar="TARGET")
@early_stopped_option
def export(directory: Path, path_name: str, target: Path, early_stopped: bool | None) -> None:
    """Write one path as a model directory for the `transformers` library.

    DIR is what `dipaco train --dir` filled, PATH a path such as 0.1. TARGET is a directory that
    is empty or not there; it gets configuration, weights and tokenizer.
    """
    with heavy_imports():
        from dipaco.llama import export_llama
        from dipaco.trained import TrainedModel

    model = TrainedModel.load(directory)
    path = model.path(path_name)
    number = model.start.topology.path_index(path)
    net = model.net(number, early_stopped=early_stopped)
    export_llama(net, model.start.tokenizer_file.read_bytes(), target)
    stopped = _early_stopped_after(model, [number], early_stopped)
    when = f"{stopped[number]}, where it did best," if stopped else model.round
    click.echo(f"path {path} after round {when} is in {target}")


@click.command(cls=Command)
@click.argument(
    "directory", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
def checkpoint(directory: Path) -> None:
    """Print the [model] section of a configuration that starts from a Llama checkpoint.

    DIR holds its config.json, tokenizer.json and safetensors.
    """
    with heavy_imports():
        from dipaco.llama import model_section

    click.echo("[model]")
    for key, value in model_section(directory).items():
        click.echo(f"{key} = {json.dumps(value)}")
    click.echo(f"\n[dense_start]\ncheckpoint = {json.dumps(str(directory))}")
