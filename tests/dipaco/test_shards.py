from pathlib import Path

import numpy as np
import pytest

import dipaco.shards
from dipaco.errors import BadBytes
from dipaco.shards import Rows, Shard, write_shard
from dipaco.topology import PathID

PATH = PathID((0, 1))
TOKENS, VOCABULARY, PAD = 16, 300, 1
TRAIN, VALID = np.array([7, 0, 7, 19, 4]), np.array([2, 1])


@pytest.fixture(scope="module")
def rows() -> Rows:
    generator = np.random.default_rng(0)
    return generator.integers(2, VOCABULARY, (20, TOKENS), dtype=np.uint16)


@pytest.fixture
def few_bytes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dipaco.shards, "_PART_BYTES", 3 * 2 * TOKENS)


def load(file: Path) -> Shard:
    return Shard.load(file, path=PATH, sequence_tokens=TOKENS, vocab_size=VOCABULARY)


@pytest.mark.usefixtures("few_bytes_at_once")
def test_a_shard_written_in_parts_is_the_same_shard(rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    write_shard(file, train=(rows, TRAIN), valid=(rows, VALID))
    whole = Shard(path=PATH, train=rows[TRAIN], valid=rows[VALID])
    assert file.read_bytes() == whole.to_bytes()
    loaded = load(file)
    assert np.array_equal(loaded.train, rows[TRAIN])
    assert np.array_equal(loaded.valid, rows[VALID])
    assert loaded.to_bytes() == whole.to_bytes()
    assert loaded.num_tokens(int(rows[7, 0])) == np.sum(rows[TRAIN] != rows[7, 0])


def test_a_shard_may_have_nothing_to_validate_on(rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    write_shard(file, train=(rows, TRAIN), valid=(rows, VALID[:0]))
    assert load(file).valid.shape == (0, TOKENS)


def test_a_damaged_file_is_refused(rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    write_shard(file, train=(rows, TRAIN), valid=(rows, VALID))
    raw = file.read_bytes()
    unknown_token = raw[:-2] + VOCABULARY.to_bytes(2, "little")
    for wrong in (b"", raw[:50], raw[:-1], raw + b"\0", unknown_token):
        file.write_bytes(wrong)
        with pytest.raises(BadBytes, match=r"not the shard of path 0\.1"):
            load(file)
    write_shard(file, train=(rows, TRAIN[:0]), valid=(rows, VALID))
    with pytest.raises(BadBytes, match="empty"):
        load(file)


def test_a_failed_write_leaves_the_old_shard(rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    write_shard(file, train=(rows, TRAIN), valid=(rows, VALID))
    with pytest.raises(IndexError):
        write_shard(file, train=(rows, TRAIN + 1), valid=(rows, VALID))
    assert np.array_equal(load(file).train, rows[TRAIN])
    assert list(tmp_path.iterdir()) == [file]
