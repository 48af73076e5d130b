"""`dipaco`: the commands of a researcher. Each parses, calls one function, and prints.

torch is imported inside the commands, so that `--help` answers at once.
"""

import sys

import click

from dipaco.errors import DipacoError
from dipaco.imports import INTERRUPTED
from dipaco.training_commands import train, train_router
from dipaco.usage_commands import checkpoint, evaluate, export, generate

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "DIPACO"}


def main() -> None:
    """Entry point: every expected failure is one line and a hint; exit 1, or 2 for usage."""
    try:
        sys.exit(cli(prog_name="dipaco", standalone_mode=False))
    except click.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DipacoError as error:
        _fail(str(error), error.hint)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", "check names, space and permissions")


def _fail(message: str, hint: str) -> None:
    click.echo(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""), err=True)
    sys.exit(1)


@click.group(context_settings=_CONTEXT)
def cli() -> None:
    """Train a DiPaCo on one machine, and use one."""


for command in (train, train_router, evaluate, generate, export, checkpoint):
    cli.add_command(command)
