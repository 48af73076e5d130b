"""Memory and speed of a preparation, by stage, and that memory does not grow with the corpus.

Makes a corpus of `--megabytes` out of the embedded one (its documents again and again, each time
with the lines in another order, so that all are different) and another of a tenth of that. Each is
prepared by a process of its own, with a small network and long sequences, while this one looks at
its memory. Pages of mapped files count into a process's RSS, although the system takes them back
whenever it likes; what a process needs is its anonymous memory, which is the figure here.

    python -m benchmarks.preparation --megabytes 1000 [--json FILE] [--plot FILE.png]

Linux only. A gigabyte takes about 3 GB of the temporary directory.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count, cycle, pairwise
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

from dipaco.config import (
    MAX_INTEGER,
    CorpusConfig,
    DenseStartConfig,
    InnerConfig,
    ModelConfig,
    RoundsConfig,
    RunConfig,
    TopologyConfig,
)
from dipaco.corpus import load_documents

SMALL_SHARE = 0.1
NUM_FILES = 4
MATERIAL = CorpusConfig(source="python", max_documents=3000, max_document_bytes=8192)
MIN_LINES = 20  # of so many, no two orders are the same
SAMPLE_SECONDS = 0.1
WHOLE_CORPUS = ("sequences", "shards")  # stages that read all of it
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The memory of a process at one time."""

    second: float
    anonymous_mib: float
    rss_mib: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a preparation: when it began, what it took."""

    name: str
    second: float
    seconds: float
    anonymous_mib: float
    rss_mib: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One preparation, and the memory of its process over time."""

    megabytes: float
    stages: list[Stage]
    samples: list[Sample]

    @property
    def seconds(self) -> float:
        """From the first stage to the end."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def anonymous_mib(self) -> float:
        """The peak of all stages."""
        return max(stage.anonymous_mib for stage in self.stages)


def config_of(files: list[Path]) -> RunConfig:
    """A run with long sequences, and a network so small that the data takes the time."""
    return RunConfig(
        name="preparation",
        model=ModelConfig(
            vocab_size=8192,
            width=64,
            num_blocks=2,
            num_heads=2,
            num_kv_heads=2,
            ffn_width=128,
            sequence_tokens=1024,
        ),
        topology=TopologyConfig(levels=(2, 2)),
        corpus=CorpusConfig(source="json", files=tuple(map(str, files)), max_documents=MAX_INTEGER),
        dense_start=DenseStartConfig(
            steps=10, learning_rate=1e-3, warmup_steps=0, batch_sequences=4
        ),
        inner=InnerConfig(batch_sequences=4, learning_rate=1e-3, warmup_steps=0),
        rounds=RoundsConfig(num_rounds=1, round_seconds=60.0, inner_steps=1),
    )


def write_corpus(directory: Path, num_bytes: float) -> list[Path]:
    """At least `num_bytes` of text in JSON-lines files."""
    files = [directory / f"{number}.jsonl" for number in range(NUM_FILES)]
    written = 0
    with ExitStack() as stack:
        streams = cycle([stack.enter_context(file.open("w")) for file in files])
        for text in texts():
            next(streams).write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= num_bytes:
                return files
    raise AssertionError("the texts are endless")


def texts() -> Iterator[str]:
    """Endless documents, all of them different."""
    material = [
        lines
        for document in load_documents(MATERIAL)
        if len(lines := document.text.splitlines(keepends=True)) >= MIN_LINES
    ]
    for seed in count():
        rng = random.Random(seed)
        for lines in material:
            yield "".join(rng.sample(lines, len(lines)))


def prepare(directory: Path) -> None:
    """The measured process: prints when each stage begins, and the end."""
    import torch

    from dipaco.preparation import prepare_start

    torch.set_num_threads(1)
    begun = set[str]()

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            print(json.dumps([stage, time.monotonic()]), flush=True)

    config = RunConfig.from_toml((directory / "run.toml").read_text())
    prepare_start(config, directory / "start", on_progress)
    print(json.dumps(["end", time.monotonic()]), flush=True)


def measure(megabytes: float) -> Measurement:
    """Prepare a corpus of this size in another process, and watch that."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = write_corpus(directory, 1e6 * megabytes)
        (directory / "run.toml").write_text(config_of(files).to_toml())
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.preparation", "--directory", name],
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HOME": str(directory / "huggingface")},
        )
        samples = list(watch(process))
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the preparation ended with exit code {process.returncode}")
    marks = [json.loads(line) for line in output.splitlines()]
    first = marks[0][1]
    samples = [
        Sample(second=s.second - first, anonymous_mib=s.anonymous_mib, rss_mib=s.rss_mib)
        for s in samples
    ]
    stages = [
        stage_of(stage, begin - first, end - first, samples)
        for (stage, begin), (_, end) in pairwise(marks)
    ]
    return Measurement(megabytes=megabytes, stages=stages, samples=samples)


def watch(process: subprocess.Popen[bytes]) -> Iterator[Sample]:
    """The memory of a process until it ends."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        memory = watched.memory_info()
        yield Sample(
            second=time.monotonic(),
            anonymous_mib=(memory.rss - memory.shared) / MIB,  # `shared` has the mapped files
            rss_mib=memory.rss / MIB,
        )
        time.sleep(SAMPLE_SECONDS)


def stage_of(name: str, begin: float, end: float, samples: list[Sample]) -> Stage:
    """A stage with its peaks; the samples before and after a short one count too."""
    during = [s for s in samples if begin - SAMPLE_SECONDS <= s.second <= end + SAMPLE_SECONDS]
    return Stage(
        name=name,
        second=begin,
        seconds=end - begin,
        anonymous_mib=max(sample.anonymous_mib for sample in during),
        rss_mib=max(sample.rss_mib for sample in during),
    )


def table_of(measurement: Measurement) -> Table:
    """A row for each stage."""
    table = Table(title=f"{measurement.megabytes:g} MB of text")
    table.add_column("stage")
    for heading in ("seconds", "MB/s", "peak anonymous MiB", "peak RSS MiB"):
        table.add_column(heading, justify="right")
    for stage in measurement.stages:
        speed = measurement.megabytes / stage.seconds if stage.name in WHOLE_CORPUS else None
        table.add_row(
            stage.name,
            f"{stage.seconds:.1f}",
            f"{speed:.1f}" if speed else "",
            f"{stage.anonymous_mib:.0f}",
            f"{stage.rss_mib:.0f}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{measurement.seconds:.1f}",
        f"{measurement.megabytes / measurement.seconds:.1f}",
        f"{measurement.anonymous_mib:.0f}",
        f"{max(stage.rss_mib for stage in measurement.stages):.0f}",
    )
    return table


def plot(measurements: list[Measurement], file: Path) -> None:
    """Memory over time, one panel per corpus, with the stages as bands."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(measurements), sharey=True, figsize=(9, 6), layout="constrained"
    )
    colors = mpl.colormaps["Pastel1"].colors  # type: ignore[attr-defined]
    for panel, measurement in zip(panels, measurements, strict=True):
        for stage, color in zip(measurement.stages, colors, strict=False):
            panel.axvspan(
                stage.second, stage.second + stage.seconds, color=color, lw=0, label=stage.name
            )
        seconds = [sample.second for sample in measurement.samples]
        anonymous = [sample.anonymous_mib for sample in measurement.samples]
        rss = [sample.rss_mib for sample in measurement.samples]
        panel.plot(seconds, rss, color="gray", lw=1, ls="--", label="RSS, mapped files included")
        panel.plot(seconds, anonymous, color="black", lw=1.5, label="anonymous memory")
        panel.set(
            title=f"{measurement.megabytes:g} MB of text",
            xlim=(0, measurement.seconds),
            ylim=(0, None),
            ylabel="MiB",
        )
    panels[-1].set_xlabel("seconds")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(file, dpi=150)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--megabytes", type=click.FloatRange(10), default=1000, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--directory", type=click.Path(path_type=Path), hidden=True)
def main(
    megabytes: float, json_file: Path | None, plot_file: Path | None, directory: Path | None
) -> None:
    """Prepare two corpora, one ten times the other, and compare their memory."""
    if directory is not None:
        prepare(directory)
        return
    measurements = [measure(SMALL_SHARE * megabytes), measure(megabytes)]
    console = Console()
    for measurement in measurements:
        console.print(table_of(measurement))
    small, large = measurements
    growth = large.anonymous_mib / small.anonymous_mib
    console.print(f"{1 / SMALL_SHARE:g} times the text, {growth:.2f} times the memory")
    if json_file is not None:
        figures = {
            "growth": round(growth, 3),
            "corpora": [
                {"megabytes": m.megabytes, "stages": [asdict(stage) for stage in m.stages]}
                for m in measurements
            ],
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if plot_file is not None:
        plot(measurements, plot_file)


if __name__ == "__main__":
    main()
