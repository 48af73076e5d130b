"""Imports that need care."""

import gc
import importlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

INTERRUPTED = 130  # the exit code that shells report for Ctrl-C


def import_for_training() -> None:
    """What torch and the routers import at their first use, when Ctrl-C would be an exception."""
    for name in ("torch._dynamo", "sklearn.cluster"):
        importlib.import_module(name)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import in the body what a long-running program stands on, and stays for as long as it runs.

    The garbage collector would look through those 400,000 objects again and again: while they are
    imported, which takes a third longer then, and later for 0.2 s at a time, in which nothing else
    of Python runs. It never looks at what is there when the body is left.

    Ctrl-C ends the program at once: as an exception it would leave packages imported in part.
    """
    gc.disable()
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        gc.freeze()
        gc.enable()


def bitsandbytes() -> ModuleType:
    """The package of that name, on any thread.

    On a CPU its import warns that a kernel is missing for products of 4-bit matrices, which
    nothing here computes.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The package, not one of its modules: those are there before the kernels are, and a thread
    # that asks for one while another thread still imports the package would find none.
    return importlib.import_module("bitsandbytes")
