import os
import subprocess
import sys
from pathlib import Path

import pytest

from dipaco.config import RunConfig
from dipaco.start import Start


def dipaco(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script"]  # torch's own, where it compiles
    command = [sys.executable, *warnings, "-c", "from dipaco.cli import main; main()"]
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_train_prints_perplexities_and_digests(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(start.config.to_toml())
    done = dipaco(
        "train", str(file), "--dir", str(start.directory), "--threads", "1", "--baseline",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
    assert "round 3" in done.stderr


@pytest.mark.parametrize(
    ("text", "device", "exit_code", "message"),
    [
        ("nonsense", "cpu", 1, "error: run.toml is not valid TOML"),
        (None, "cpu", 2, "does not exist"),
        ("", "tpu", 1, "error: corpus is missing"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    text: str | None, device: str, exit_code: int, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    done = dipaco("train", "run.toml", "--device", device, cwd=tmp_path)
    assert done.returncode == exit_code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_device_names_those_there_are(tiny: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny.to_toml())
    done = dipaco("train", "run.toml", "--device", "tpu", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no device 'tpu' on this machine\n\nhint: available: cpu")


def test_a_machine_that_cannot_compile_says_what_it_lacks(tiny: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny.to_toml())
    nothing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = dipaco("train", "run.toml", "--compile", cwd=tmp_path, **nothing)
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch.compile does not work on cpu: InvalidCxxCompiler")
    assert "hint: install a C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_answers_without_torch() -> None:
    code = """
import sys
from dipaco.cli import main
sys.argv = ["dipaco", "train", "--help"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--threads" in done.stdout
