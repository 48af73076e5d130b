"""The paper's comparisons in miniature: routing, sharing, outer step, re-routing, wire formats.

    python -m benchmarks.quality [--size SIZE] [--json FILE] [--plots DIR] [--text FOLDER]

`tiny`, `cpu` and `gpu` are what their names say. `long` asks whether more steps change the
order of paths and replicas: three times the steps of `cpu`.

Trainings run side by side, one thread each, and are kept in the working directory: interrupted, it
continues.
"""

import json
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality.plan import Experiment, Size, experiments
from benchmarks.quality.report import print_tables, write_markdown, write_plots
from benchmarks.quality.run import Figures, prepare, run
from dipaco.config import RunConfig, TopologyConfig

TABLE_WIDTH = 150  # characters: a narrower terminal wraps lines, and cuts no figures


def base_of(config: RunConfig) -> tuple[str, RunConfig]:
    """A name for text, seed and dense start, and a small run that prepares just these."""
    corpus = config.corpus
    name = f"base-{config.seed}-{corpus.max_documents}-{config.routing.router_fraction:g}"
    single = replace(config.routing, method="hash", overlap=1, phases=())
    return name, replace(config, topology=TopologyConfig(levels=(1,)), routing=single)


def routed_of(config: RunConfig) -> str:
    """A name for the same with modules, router and shards."""
    routed = repr((config.topology, config.routing)).encode()
    return f"{base_of(config)[0]}-{crc32(routed):08x}"


@click.command()
@click.option(
    "--size", type=click.Choice(["tiny", "cpu", "long", "gpu"]), default="tiny", show_default=True
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option(
    "--plots", "plots_dir", type=click.Path(path_type=Path), help="Write tables and PNGs here."
)
@click.option(
    "--text",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train on the text files of a folder instead of the embedded corpus.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("quality-run"))
@click.option("--workers", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)))
@click.option("--only", multiple=True, metavar="NAME", help="Run these experiments only.")
def main(  # noqa: PLR0913 - one parameter per option
    size: Size,
    json_file: Path | None,
    plots_dir: Path | None,
    text: Path | None,
    work: Path,
    workers: int,
    only: tuple[str, ...],
) -> None:
    """Compare trainings at equal steps."""
    plan = experiments(size, text)
    names = [e.name for e in plan]
    if unknown := [name for name in only if name not in names]:
        raise click.BadParameter(
            f"{', '.join(unknown)}; accepted: {', '.join(names)}", param_hint="--only"
        )
    plan = [e for e in plan if not only or e.name in only]
    work = work / size
    device = "cuda" if size == "gpu" else "cpu"
    workers = 1 if size == "gpu" else workers
    begun = time.monotonic()
    figures: dict[str, Figures] = {}
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.1f} M tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("preparing", total=sum(e.tokens for e in plan) / 1e6)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            bases = dict(base_of(e.config) for e in plan)
            texts = [pool.submit(prepare, c, work / n, device) for n, c in bases.items()]
            for number, done in enumerate(as_completed(texts), 1):
                done.result()
                progress.update(task, description=f"text {number} of {len(texts)}")
            routed = {routed_of(e.config): e.config for e in plan}
            shards = [
                pool.submit(prepare, c, work / n, device, work / base_of(c)[0])
                for n, c in routed.items()
            ]
            for number, done in enumerate(as_completed(shards), 1):
                done.result()
                progress.update(task, description=f"shards {number} of {len(shards)}")
            futures: dict[Future[Figures], Experiment] = {
                pool.submit(run, e, work / routed_of(e.config), work / e.name, device): e
                for e in plan
            }
            for future in as_completed(futures):
                experiment = futures[future]
                try:
                    figures[experiment.name] = future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # do not train on in vain
                    raise
                progress.update(task, advance=experiment.tokens / 1e6, description=experiment.name)
                progress.console.print(
                    f"{experiment.name}: perplexity {figures[experiment.name]['ppl']:.2f}"
                )
                ordered = {e.name: figures[e.name] for e in plan if e.name in figures}
                write(ordered, json_file, plots_dir)
    print_tables(ordered, Console(width=max(Console().width, TABLE_WIDTH)))
    click.echo(f"{time.monotonic() - begun:.0f} s on {workers} workers")


def write(figures: dict[str, Figures], json_file: Path | None, plots_dir: Path | None) -> None:
    """Everything known so far, so that an interrupted comparison has something to show."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if plots_dir is not None:
        write_plots(figures, plots_dir)
        write_markdown(figures, plots_dir / "quality.md")


if __name__ == "__main__":
    main()
