"""Tables and plots of what the trainings came to."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = dict[str, Any]


Grid = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of a table."""


def print_tables(figures: dict[str, Figures], console: Console) -> None:
    """Perplexities on the test sequences, the routing prefix not counted."""
    for title, header, rows in _grids(figures):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_markdown(figures: dict[str, Figures], file: Path) -> None:
    """The same tables for a document."""
    lines = []
    for title, header, rows in _grids(figures):
        lines += [f"**{title}**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        lines.append("")
    file.write_text("\n".join(lines))


def _grids(figures: dict[str, Figures]) -> Iterator[Grid]:
    rows = []
    for name, found in figures.items():
        dense = figures.get(_baseline(name))
        rows.append(
            [
                name,
                str(found["steps"]),
                f"{found['tokens'] / 1e6:.2f}",
                f"{found['flops'] / 1e12:.1f}",
                f"{found['epochs']:.1f}",
                f"{found['ppl']:.2f}",
                f"{math.log(found['ppl']):.4f}",
                f"{found['ppl'] / dense['ppl']:.3f}" if dense is not None else "",
                *(_cell(found, f"ppl_rerouted_{every}") for every in (64, 32, 16)),
                _cell(found, "ppl_early_stopped"),
                f"{found['train_seconds']:.0f}",
            ]
        )
    header = ["training", "steps", "M tokens", "TFLOP", "epochs", "ppl", "loss", "ppl / dense"]
    header += ["every 64", "every 32", "every 16", "early-stopped", "processor s"]
    yield "test perplexity", header, rows
    rows = [
        [
            name,
            f"{100 * found['router_accuracy']:.0f} %",
            f"{found['ppl']:.2f}",
            f"{found['ppl_best_path']:.2f}",
            *(_cell(found, f"ppl_token_router_{every}") for every in (64, 32, 16)),
        ]
        for name, found in figures.items()
        if "router_accuracy" in found
    ]
    header = ["training", "router names the best path", "ppl", "ppl of the best path"]
    header += ["token-level router every 64", "every 32", "every 16"]
    yield "routers", header, rows


def _baseline(name: str) -> str:
    """The dense model with as many steps on the same text."""
    if name.endswith("-small"):
        return "dense-small"
    if "-seed-" in name:
        return f"dense-seed-{name.rpartition('-seed-')[2]}"
    if name in _ROUTERS or name == "dense-routers":
        return "dense-routers"
    return "dense" if name in _MAIN else "dense-short"


def _cell(found: Figures, key: str) -> str:
    return f"{found[key]:.2f}" if key in found else ""


_MAIN = (
    "dense", "1x1", "diloco-4-main", "flat-4", "2x2-hash-main", "2x2", "4x4",
    "2x2-synchronous",
)  # fmt: skip
_ROUTERS = {
    "2x2-kmeans": "k-means",
    "2x2-product-kmeans": "product k-means",
    "2x2-discriminative": "discriminative",
    "2x2-tiny-lm": "tiny language models",
    "2x2-hash": "hash",
}
_CONFUSION_PATHS = 4
_DARK = 0.6  # a share from which on black cannot be read
_SHORT = ("dense-short", "dense-4x", "1x1-short", "diloco-4", "2x2-short", "2x4-short", "4x4-short")


def write_plots(figures: dict[str, Figures], directory: Path) -> None:
    """Perplexity over steps, seconds and FLOPs; shard sizes; router confusion."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    _plot_curves(figures, directory / "quality-curves.png", _MAIN)
    if any(name in figures for name in _SHORT):
        _plot_curves(figures, directory / "quality-paths.png", _SHORT)
    small = tuple(name for name in figures if name.endswith("-small"))
    if small:
        _plot_curves(figures, directory / "quality-small-shards.png", small)
    _plot_shards(figures, directory / "quality-shards.png")
    _plot_confusion(figures, directory / "quality-confusion.png")


def _plot_curves(figures: dict[str, Figures], file: Path, names: tuple[str, ...]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    axes_of = {"inner steps of a path": 0, "processor seconds of training": 1, "FLOPs": 2}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    for axis, (label, column) in zip(axes, axes_of.items(), strict=True):
        for name in names:
            points = figures.get(name, {}).get("curve", [])
            if points:
                axis.plot([p[column] for p in points], [p[3] for p in points], label=name)
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("validation perplexity")
    axes[2].set_xscale("log")
    axes[0].legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _plot_shards(figures: dict[str, Figures], file: Path) -> None:
    """Each router's shards by size, against equal ones."""
    import matplotlib.pyplot as plt

    shown = {
        title: sorted(figures[name]["shard_tokens"], reverse=True)
        for name, title in _ROUTERS.items()
        if name in figures
    }
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.6 * len(shown), 3.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, tokens) in zip(axes[0], shown.items(), strict=True):
        axis.bar(range(1, len(tokens) + 1), [100 * n / sum(tokens) for n in tokens])
        axis.axhline(100 / len(tokens), color="black", linewidth=1, linestyle="dashed")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("shard, by size")
    axes[0][0].set_ylabel("share of the tokens, %")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _plot_confusion(figures: dict[str, Figures], file: Path) -> None:
    """Of the test sequences that a path predicts best: where each router sends them."""
    import matplotlib.pyplot as plt

    shown = {
        title: figures[name]["confusion"]
        for name, title in _ROUTERS.items()
        if len(figures.get(name, {}).get("confusion", [])) == _CONFUSION_PATHS
    }
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.6 * len(shown), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (title, counts) in zip(axes[0], shown.items(), strict=True):
        shares = [[n / max(1, sum(row)) for n in row] for row in counts]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, of_path in enumerate(shares):
            for column, share in enumerate(of_path):
                color = "white" if share > _DARK else "black"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("path by the router")
        axis.set_xticks(range(len(shares)))
        axis.set_yticks(range(len(shares)))
    axes[0][0].set_ylabel("path that predicts best")
    figure.savefig(file, dpi=100)
    plt.close(figure)
