"""Options that several commands share."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

trained_dir = click.argument(
    "directory", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
device_option = click.option(
    "--device", "device_name", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    metavar="N",
    help="CPU threads of torch. The last bits of a result depend on it.",
)
compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Train through torch.compile: a slower start, then faster steps.",
)
early_stopped_option = click.option(
    "--early-stopped/--last",
    default=None,
    show_default="early-stopped where that was kept",
    help="Take paths as they were when they did best on validation text, or as they are.",
)
token_router_option = click.option(
    "--token-router",
    is_flag=True,
    help="Re-route by the token-level router that `dipaco train-router` made.",
)


def open_device(name: str, threads: int) -> "torch.device":
    """Set the number of threads and find the device; ConfigError if there is none."""
    import torch

    from dipaco.device import find_device

    torch.set_num_threads(threads)
    return find_device(name)
