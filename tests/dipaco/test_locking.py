import errno
from pathlib import Path

import pytest
from click.testing import CliRunner

from bootstrap.cli import main as bootstrap
from dipaco.cli import main as dipaco
from dipaco.config import RunConfig
from dipaco.errors import ConfigError
from dipaco.locking import working_in


def test_what_trains_or_is_prepared_in_a_directory_is_alone_there(
    tiny: RunConfig, tmp_path: Path
) -> None:
    """Another configuration would put its shards in the place of those that are trained on."""
    config, directory = tmp_path / "run.toml", tmp_path / "work"
    config.write_text(tiny.to_toml())
    with working_in(directory):
        before = sorted(directory.iterdir())
        for program, arguments in (
            (dipaco, ["train", config, "--dir", directory]),
            (bootstrap, ["prepare", config, directory]),
        ):
            refused = CliRunner().invoke(program, [str(argument) for argument in arguments])
            assert refused.exit_code == 1
            assert refused.stderr.startswith(
                f"error: another process is at work in `{directory}`\n"
            )
            assert "hint: wait until it has ended" in refused.stderr
        assert sorted(directory.iterdir()) == before
    with working_in(directory):
        pass


def test_a_directory_that_cannot_be_locked_is_not_taken_for_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(ConfigError, match=r"cannot lock .*: No locks available"),
        working_in(tmp_path),
    ):
        pass
