"""Fixtures: a run small enough for tests, and its start, prepared once."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dipaco.config import RunConfig
from dipaco.preparation import prepare_start
from dipaco.start import Start

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = {
    "numbers": ["one", "two", "three", "four", "five", "six", "seven"],
    "colors": ["red", "green", "blue", "black", "white", "gray"],
    "code": ["def f(x):", "return", "x += 1", "while True:", "break", "\n"],
    "letters": ["alpha", "beta", "gamma", "delta", "epsilon"],
}


@pytest.fixture(autouse=True, scope="session")
def small_footprint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing left in the home directory (`datasets` puts lock files there)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """One file of made-up text per kind."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for kind, words in WORDS.items():
        lines = (" ".join(rng.choices(words, k=12)) + "\n" for _ in range(900))
        (directory / f"{kind}.txt").write_text("".join(lines))
    return tuple(str(directory / f"{kind}.txt") for kind in WORDS)


@pytest.fixture(scope="session")
def tiny(text_files: tuple[str, ...]) -> RunConfig:
    """`examples/tiny.toml` on the made-up text."""
    values = RunConfig.from_toml((EXAMPLES / "tiny.toml").read_text()).to_dict()
    values["corpus"] |= {"source": "text", "files": text_files, "max_document_bytes": 512}
    values["corpus"] |= {"test_fraction": 0.02}
    values["routing"] |= {"router_fraction": 0.0}  # so that all of the little text is trained on
    values["outer"] |= {"wire_format": "float32"}
    return RunConfig.from_dict(values)


@pytest.fixture(scope="session")
def start(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return prepare_start(tiny, tmp_path_factory.mktemp("start"))
