"""What a directory must hold once its run was served, and what may not change in it."""

from pathlib import Path

import pytest

from bootstrap.prepare import IDENTITY_FILE, MANIFEST_FILE, prepare_run, served_manifest
from dipaco.errors import ConfigError
from tests.little_run import identity, little_config, make_run

CONFIG = little_config()
RUN = make_run(CONFIG, operator=identity(1), start_time=0.0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """That of a run which was served."""
    (tmp_path / IDENTITY_FILE).write_bytes(identity(1).to_bytes())
    (tmp_path / MANIFEST_FILE).write_bytes(RUN.manifest.to_bytes())
    return tmp_path


@pytest.mark.parametrize("raw", [b"", RUN.manifest.to_bytes()[:-9], RUN.manifest.to_bytes() + b" "])
def test_a_damaged_manifest_is_to_be_restored(directory: Path, raw: bytes) -> None:
    """And is not taken for a run that was never served."""
    assert served_manifest(directory) == RUN.manifest
    (directory / MANIFEST_FILE).write_bytes(raw)
    with pytest.raises(ConfigError, match=MANIFEST_FILE) as caught:
        prepare_run(CONFIG, directory, lambda stage, done, total: None)
    assert "restore" in caught.value.hint
