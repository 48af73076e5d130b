"""`dipaco`: the commands of a researcher. Each parses, calls one function, and prints.

torch is imported inside the commands, so that `--help` answers at once.
"""

import click

from dipaco.command_line import CONTEXT_SETTINGS, CommandLine
from dipaco.training_commands import train, train_router
from dipaco.usage_commands import checkpoint, evaluate, export, generate


@click.group(cls=CommandLine, context_settings=CONTEXT_SETTINGS)
def main() -> None:
    """Train a DiPaCo on one machine, and use one."""


for command in (train, train_router, evaluate, generate, export, checkpoint):
    main.add_command(command)
