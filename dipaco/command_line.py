"""How the commands of every program here end: one-line errors and exit codes.

Exit 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one line, an empty line and a
hint; a traceback is shown only with `-vv`, and for an error that is nobody's but ours.
"""

import errno
import sys
from collections.abc import Collection, Iterator
from typing import Any

import click

from dipaco.imports import INTERRUPTED

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "DIPACO",
    "max_content_width": 100,
}


class Command(click.Command):
    """A command whose errors are one line and a hint, if a person can do something about them."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as click has it
        """Run it; exit 1 after an error that `explain` knows."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            explained = explain(error, {name for option in self.params for name in option.opts})
            if explained is None or ctx.params.get("verbose", 0) > 1:
                raise
        message, hint = explained
        click.echo(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""), err=True)
        raise SystemExit(1)


class CommandLine(click.Group):
    """A program: a group of commands of the kind above."""

    command_class = Command

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add one that was made elsewhere."""
        assert isinstance(cmd, Command), "its errors would be tracebacks"
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as click has it
        """Run the command asked for; exit 130 on Ctrl-C, also while its arguments are read."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None


def explain(error: Exception, options: Collection[str]) -> tuple[str, str] | None:
    """(message, hint) of an error of a command with these options; None if it is a bug of ours.

    Of a group of errors the first is told, unless one of the others is such a bug.
    """
    explained = [_explain_one(leaf, options) for leaf in _leaves(error)]
    return None if None in explained else explained[0]


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _explain_one(error: Exception, options: Collection[str]) -> tuple[str, str] | None:
    hint = getattr(error, "hint", None)
    if isinstance(hint, str):  # a `DipacoError`, or what other packages raise on purpose
        return str(error), hint
    if isinstance(error, OSError):
        return _explain_system(error)
    if isinstance(error, RuntimeError):
        return _explain_device(error, options)
    return None


def _explain_system(error: OSError) -> tuple[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the disk is full; nothing that was written is lost",
            "free some space and start the same command again",
        )
    if not error.filename:
        return error.strerror or str(error), ""
    return f"{error.strerror or error} (`{error.filename}`)", "check the name and its permissions"


def _explain_device(error: RuntimeError, options: Collection[str]) -> tuple[str, str] | None:
    """What torch raises when the device fails; it has no type for every such error."""
    torch = sys.modules.get("torch")  # if it was not imported, this is none of its errors
    line = str(error).partition("\n")[0]
    is_failure = isinstance(error, getattr(torch, "AcceleratorError", ()))
    is_failure = is_failure or line.startswith("CUDA error")
    is_full = isinstance(error, getattr(torch, "OutOfMemoryError", ()))
    if is_full or (is_failure and ("out of memory" in line or "ALLOC_FAILED" in line)):
        hint = "another program may have taken it; start the same command again when it is free"
        if "--optimizer" in options:
            hint += ", with the same `--state-dir`; `--optimizer adamw8bit` needs less"
        return "the memory of the device is full", hint
    if not is_failure:
        return None
    hint = "see what the driver says: `nvidia-smi`, and `dmesg | grep -i nvidia`"
    if "--device" in options:
        hint = f"try `--device cpu`, or {hint}"
    return f"the GPU failed: {line.removeprefix('CUDA error: ')}", hint
