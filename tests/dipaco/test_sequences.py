import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dipaco.document import Split
from dipaco.errors import BadBytes, ConfigError
from dipaco.preparation import prepare_start
from dipaco.sequences import SPLITS, read_split, rows_of, write_sequences
from dipaco.start import Start

END, PAD = 0, 1
OPTIONS = {"sequence_tokens": 8, "prefix_tokens": 2, "end_token": END, "pad_token": PAD}
write = partial(write_sequences, **OPTIONS)
Documents = Sequence[tuple[Split, list[int]]]
DOCUMENTS: Documents = [
    ("train", [5] * 11),
    ("valid", [6] * 8),
    ("test", [7] * 2),  # too short for a row
    ("train", [8] * 7),
]


def test_a_document_becomes_rows_with_a_padded_tail() -> None:
    assert rows_of([5] * 11, **OPTIONS).tolist() == [
        [5] * 8,
        [5, 5, 5, END, PAD, PAD, PAD, PAD],
    ]
    assert rows_of([6] * 8, **OPTIONS).tolist() == [[6] * 8]  # its end alone is not worth a row
    assert rows_of([7] * 2, **OPTIONS).shape == (0, 8)


def test_every_split_has_its_rows_in_the_order_of_the_documents(tmp_path: Path) -> None:
    files = write(tmp_path, iter(DOCUMENTS))
    assert [file.stem for file in files] == list(SPLITS)
    train = read_split(tmp_path, "train")
    assert train.dtype == np.uint16
    assert train[:, 0].tolist() == [5, 5, 8]
    assert read_split(tmp_path, "valid").tolist() == [[6] * 8]
    assert read_split(tmp_path, "test").shape == read_split(tmp_path, "router").shape == (0, 8)
    assert np.array_equal(np.load(files[0]), train)  # any tool can read them


def test_all_splits_are_written_or_none(tmp_path: Path) -> None:
    files = write(tmp_path, DOCUMENTS)
    before = [file.read_bytes() for file in files]
    for kept in ("train", "valid"):
        with pytest.raises(ConfigError, match=r"no (train|valid) document is as long as 4 tokens"):
            write(tmp_path, [(split, tokens) for split, tokens in DOCUMENTS if split == kept])
    assert [file.read_bytes() for file in files] == before
    assert sorted(files[0].parent.iterdir()) == sorted(files)


def test_rows_do_not_depend_on_how_much_is_encoded_at_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(start.directory, tmp_path / "copy")
    (copy / "sequences.stage.json").unlink()
    monkeypatch.setattr("dipaco.preparation._BATCH_CHARACTERS", 1000)
    again = prepare_start(start.config, copy)
    for split in SPLITS:
        assert np.array_equal(again.rows(split), start.rows(split))
    assert len(start.rows("test")) > 0


def test_a_damaged_split_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, DOCUMENTS)[0]
    raw = file.read_bytes()
    other = raw.replace(b"<u2", b"<i2")
    for wrong in (b"", raw[:-1], raw[:100], other, raw.replace(b"}", b"(")):
        file.write_bytes(wrong)
        with pytest.raises(BadBytes, match=r"train\.npy is damaged") as caught:
            read_split(tmp_path, "train")
        assert "delete it" in caught.value.hint
    file.unlink()
    with pytest.raises(BadBytes):
        read_split(tmp_path, "train")
