"""What the tests of real swarms share."""

from pathlib import Path

import pytest

from dipaco.config import RunConfig
from dipaco.preparation import prepare_start
from dipaco.start import Start

TINY = Path(__file__).parents[2] / "examples" / "tiny.toml"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`examples/tiny.toml`, as it is."""
    return prepare_start(RunConfig.from_toml(TINY.read_text()), tmp_path_factory.mktemp("prepared"))
