"""What a directory must hold once its run was served, and what may not change in it."""

from pathlib import Path

import pytest

from bootstrap.prepare import (
    IDENTITY_FILE,
    MANIFEST_FILE,
    prepare_run,
    served_manifest,
    sign_manifest,
)
from dht.errors import LocalFault
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


@pytest.mark.parametrize("key", [None, identity(2).to_bytes()], ids=["lost", "another"])
def test_a_run_is_not_served_with_another_key(directory: Path, key: bytes | None) -> None:
    """Its address would be dead, and nothing that it signs would count."""
    file = directory / IDENTITY_FILE
    file.unlink()
    if key is not None:
        file.write_bytes(key)
    with pytest.raises(LocalFault, match=f"`{file}` is not the key") as caught:
        prepare_run(CONFIG, directory, lambda stage, done, total: None)
    assert "restore" in caught.value.hint
    assert file.exists() == (key is not None), "no other one is made in its place"


def test_a_run_is_signed_once(directory: Path) -> None:
    with pytest.raises(ConfigError, match=MANIFEST_FILE):
        sign_manifest(RUN.manifest, directory, identity(1), start_time=7.0)
    assert served_manifest(directory) == RUN.manifest
