"""Ctrl-C while a command still imports what it stands on: exit 130, and not a word."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from bootstrap.cli import main as bootstrap
from dipaco.cli import main as dipaco
from peer.cli import main as peer
from tests.little_run import identity

# Some packages make another error of Ctrl-C. These do, and it is pressed while they load.
PROGRAM = """
import os, signal, sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Interrupted(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self) if name in {packages!r} else None

    def exec_module(self, module):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("torn") from None

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin with it ignored
sys.meta_path.insert(0, Interrupted())
from {module} import main
main({arguments!r})
"""
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{identity(7).peer_id}"
CONFIG = str(Path(__file__).parents[2] / "examples" / "tiny.toml")
PROGRAMS: dict[str, click.Group] = {
    "dipaco.cli": dipaco,
    "peer.cli": peer,
    "bootstrap.cli": bootstrap,
}
COMMANDS = {
    ("dipaco.cli", "train"): [CONFIG],
    ("dipaco.cli", "train-router"): ["."],
    ("dipaco.cli", "evaluate"): ["."],
    ("dipaco.cli", "generate"): [".", "prompt"],
    ("dipaco.cli", "export"): [".", "0.0", "target"],
    ("dipaco.cli", "checkpoint"): ["."],
    ("peer.cli", "join"): [ADDRESS],
    ("peer.cli", "status"): [ADDRESS],
    ("peer.cli", "check"): [ADDRESS],
    ("peer.cli", "export"): ["0.0", "target"],
    ("bootstrap.cli", "status"): [ADDRESS],
    ("bootstrap.cli", "prepare"): [CONFIG, "target"],
    ("bootstrap.cli", "grow"): [".", "--levels", "2,2"],
    ("bootstrap.cli", "serve"): ["."],
}
LIGHT = {("peer.cli", "identity")}


def interrupt(
    module: str, arguments: list[str], *, packages: set[str]
) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(module=module, arguments=arguments, packages=packages)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_every_command_is_here() -> None:
    there = {(module, name) for module, group in PROGRAMS.items() for name in group.commands}
    assert there == COMMANDS.keys() | LIGHT


@pytest.mark.parametrize(("module", "name"), COMMANDS)
def test_ctrl_c_while_torch_loads_is_no_error(module: str, name: str) -> None:
    arguments = [name, *COMMANDS[module, name]]
    done = interrupt(module, arguments, packages={"torch", "numpy"})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [
        ("dipaco.cli", "train", "sklearn"),
        ("dipaco.cli", "train-router", "torch._dynamo"),
        ("bootstrap.cli", "prepare", "torch._dynamo"),
    ],
)
def test_ctrl_c_while_what_trains_loads_is_no_error(module: str, name: str, package: str) -> None:
    """Which torch, for one, would import at the first optimizer, amid a training."""
    done = interrupt(module, [name, *COMMANDS[module, name]], packages={package})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_hivemind_loads_is_no_error(tmp_path: Path) -> None:
    arguments = ["join", ADDRESS, "--quiet", "--state-dir", str(tmp_path)]
    done = interrupt("peer.cli", arguments, packages={"hivemind"})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
