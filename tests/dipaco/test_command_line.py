"""How a command ends: each error that is not a bug is one line, whichever program it is of."""

import errno
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
import torch
from click.testing import CliRunner, Result

from dipaco.command_line import Command, CommandLine
from dipaco.errors import BadBytes, ConfigError


def run(error: BaseException, *options: str, arguments: tuple[str, ...] = ()) -> Result:
    """A program whose only command has these options, and raises the error."""

    def fail(**_: object) -> None:
        raise error

    params = [click.Option([option]) for option in options]
    verbose = click.Option(["-v", "--verbose"], count=True)
    command = Command("command", callback=fail, params=[*params, verbose])
    return CliRunner().invoke(CommandLine(commands=[command]), ["command", *arguments])


def lines(result: Result) -> tuple[str, str]:
    """The error and the hint that were printed, and nothing else."""
    assert result.exit_code == 1
    assert not result.stdout
    error, empty, hint = result.stderr.splitlines()
    assert not empty
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


@pytest.mark.parametrize("kind", [ConfigError, BadBytes])
@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: ExceptionGroup("", [error])])
def test_what_is_raised_on_purpose_is_one_line_and_its_hint(
    kind: type[Exception], wrap: Callable[[Exception], Exception]
) -> None:
    assert lines(run(wrap(kind("it is so", "do that")))) == ("it is so", "do that")
    assert run(wrap(kind("it is so", ""))).stderr == "error: it is so\n"


def test_a_traceback_is_shown_when_asked_for() -> None:
    result = run(ConfigError("it is so"), arguments=("-vv",))
    assert isinstance(result.exception, ConfigError)
    assert lines(run(ConfigError("it is so", "do that"), arguments=("-v",)))


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_lost() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    error, hint = lines(run(ExceptionGroup("tasks", [full])))
    assert error == "the disk is full; nothing that was written is lost"
    assert hint.startswith("free some space")


def test_another_error_of_the_system_names_the_file() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "run.toml")
    error, hint = lines(run(denied))
    assert error == "Permission denied (`run.toml`)"
    assert "permissions" in hint
    assert run(OSError("no route")).stderr == "error: no route\n"


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_whose_memory_is_taken_is_one_line_and_a_hint(full: Exception) -> None:
    error, hint = lines(run(ExceptionGroup("tasks", [full]), "--optimizer"))
    assert error == "the memory of the device is full"
    assert hint.startswith("another program may have taken it")
    assert "--state-dir" in hint
    assert "--optimizer adamw8bit" in hint
    _, hint = lines(run(full))
    assert "--optimizer" not in hint, "it has no such option"


@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_gpu_that_fails_is_one_line_and_a_hint(kind: type[Exception]) -> None:
    failure = kind(
        "CUDA error: an illegal memory access was encountered\n"
        "CUDA kernel errors might be asynchronously reported at some other API call"
    )
    error, hint = lines(run(ExceptionGroup("tasks", [failure]), "--device"))
    assert error == "the GPU failed: an illegal memory access was encountered"
    assert "try `--device cpu`" in hint
    assert "nvidia-smi" in hint
    _, hint = lines(run(failure))
    assert "--device" not in hint, "it has no such option"


@pytest.mark.parametrize("others", [[], [ConfigError("it is so")]])
def test_a_bug_is_no_matter_of_the_person(others: list[Exception]) -> None:
    result = run(ExceptionGroup("tasks", [*others, RuntimeError("a bug")]))
    assert isinstance(result.exception, ExceptionGroup)
    assert not result.output


def test_wrong_usage_is_told_apart_from_a_failure() -> None:
    result = run(click.UsageError("not both"))
    assert result.exit_code == 2
    assert "not both" in result.stderr


def test_ctrl_c_is_told_apart_from_a_failure() -> None:
    interrupted = run(KeyboardInterrupt())
    assert (interrupted.exit_code, interrupted.output) == (130, "")


def test_ctrl_c_while_arguments_are_read_is_the_same() -> None:
    class Slow(click.ParamType[str]):
        name = "slow"

        def convert(self, *_: object) -> str:
            raise KeyboardInterrupt

    command = Command("command", params=[click.Argument(["slow"], type=Slow())])
    interrupted = CliRunner().invoke(CommandLine(commands=[command]), ["command", "x"])
    assert (interrupted.exit_code, interrupted.output) == (130, "")


def test_an_error_without_torch_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from dipaco.command_line import explain\n"
        "assert explain(RuntimeError('a bug'), ()) is None\n"
        "assert explain(OSError('no route'), ()) is not None\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
