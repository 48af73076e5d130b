import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dipaco.corpus
from dipaco.config import CorpusConfig
from dipaco.corpus import load_documents, split_of
from dipaco.document import Document, Split
from dipaco.errors import ConfigError

EMBEDDED = CorpusConfig(source="python", max_documents=150, max_document_bytes=2048)


@pytest.fixture(scope="module")
def embedded() -> list[Document]:
    return list(load_documents(EMBEDDED))


def test_embedded_text_is_of_several_kinds_and_bounded(embedded: list[Document]) -> None:
    assert len(embedded) == 150
    assert max(len(document.text.encode()) for document in embedded) <= 2048
    num_bytes = Counter[str]()
    for document in embedded:
        num_bytes[document.kind] += len(document.text)
    assert len(num_bytes) >= 5
    assert max(num_bytes.values()) < 0.5 * num_bytes.total()


def test_embedded_text_comes_in_one_order(embedded: list[Document]) -> None:
    again = list(load_documents(replace(EMBEDDED, max_documents=60)))
    assert again == embedded[:60]


def test_no_source_is_in_two_splits(embedded: list[Document]) -> None:
    config = replace(EMBEDDED, valid_fraction=0.2, test_fraction=0.2)
    texts: dict[Split, set[str]] = {}
    for document in embedded:
        split = split_of(document.source, config, router_fraction=0.2)
        texts.setdefault(split, set()).add(document.text)
    assert set(texts) == {"train", "valid", "test", "router"}
    assert sum(len(part) for part in texts.values()) == len(set[str]().union(*texts.values()))
    sources = {document.source for document in embedded if document.kind == "code"}
    assert sources & {document.source for document in embedded if document.kind == "docstrings"}


def test_code_and_its_docstrings_are_apart(embedded: list[Document]) -> None:
    from dipaco.embedded_corpus import _split_python

    code, docstrings = _split_python(Path(json.__file__))
    assert "JSON (JavaScript Object Notation)" in docstrings
    assert "JSON (JavaScript Object Notation)" not in code
    assert "def dumps(" in code


def test_local_files_load_the_same_way(tmp_path: Path) -> None:
    texts = [f"document {i}\nhas lines\n" for i in range(5)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in [*texts, texts[0]])
    (tmp_path / "a.jsonl").write_text(lines)
    config = CorpusConfig(source="json", files=(str(tmp_path / "a.jsonl"),), text_column="body")
    assert [document.text for document in load_documents(config)] == texts  # the double is gone
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"body": null}\n')  # is passed over
    assert len(list(load_documents(config))) == len(texts)
    with pytest.raises(ConfigError, match="no text column") as caught:
        list(load_documents(replace(config, text_column="text")))
    assert "body" in caught.value.hint


def test_a_long_text_file_is_cut_at_lines(tmp_path: Path) -> None:
    lines = [f"line {i} with ümläut\n" for i in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines) + "x" * 500)
    config = CorpusConfig(source="text", files=(str(tmp_path / "a.txt"),), max_document_bytes=100)
    documents = list(load_documents(config))
    assert "".join(document.text for document in documents).startswith("".join(lines))
    assert all(len(document.text.encode()) <= 100 for document in documents)
    assert len({document.source for document in documents}) == len(documents)


def test_a_text_larger_than_what_is_read_at_once_keeps_every_line(tmp_path: Path) -> None:
    text = "".join(f"{number} words in a line\n" for number in range(80_000))
    assert len(text) > 1.5 * 2**20
    (tmp_path / "a.txt").write_text(text)
    config = CorpusConfig(source="text", files=(str(tmp_path / "a.txt"),), max_documents=10**6)
    documents = list(load_documents(config))
    assert "".join(document.text for document in documents) == text
    assert min(len(document.text) for document in documents[:-1]) > config.max_document_bytes - 40


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    num_bytes = 0
    with (tmp_path / "a.txt").open("w") as stream:
        for number in range(2_000):
            num_bytes += stream.write(f"{number} {'text ' * 2_000}\n")
    config = CorpusConfig(source="text", files=(str(tmp_path / "a.txt"),))
    next(load_documents(config))  # imports what it needs
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in load_documents(config)) == num_bytes
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < num_bytes / 2


def test_more_files_than_are_read_at_a_time(tmp_path: Path) -> None:
    for number in range(20):
        lines = (f"{number:2} {line} {'x' * 50}\n" for line in range(3))
        (tmp_path / f"{number}.txt").write_text("".join(lines))
    files = tuple(str(tmp_path / f"{number}.txt") for number in range(20))
    config = CorpusConfig(source="text", files=files, max_document_bytes=64)
    kinds = [document.kind for document in load_documents(config)]
    assert Counter(kinds) == dict.fromkeys(files, 3)
    assert len(set(kinds[:8])) == 8  # in turn


def test_doubles_are_found_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dipaco.corpus, "_MAX_RECENT", 10)
    seen = dipaco.corpus._Seen()
    texts = [f"text {number}" for number in range(35)]
    assert all(seen.add(text) for text in texts)
    assert not any(seen.add(text) for text in texts)
    assert seen.add("another")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    config = CorpusConfig(source="parquet", files=(str(tmp_path / "a.parquet"),))
    assert [document.text for document in load_documents(config)] == ["one", "two"]


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    config = CorpusConfig(source="text", files=(str(tmp_path / "absent.txt"),))
    with pytest.raises(ConfigError, match="cannot read the corpus"):
        list(load_documents(config))


@pytest.mark.parametrize("kind", ["text", "json"])
@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip"])
def test_a_damaged_file_is_a_config_error(kind: str, ending: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} {hash(n * 0.7)}"}) + "\n" for n in range(200))
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zip": zipped}
    raw = compress[ending](lines.encode())
    file = tmp_path / f"a.jsonl.{ending}"
    config = CorpusConfig(source=kind, files=(str(file),))
    file.write_bytes(raw)
    assert list(load_documents(config))
    middle = len(raw) // 2
    for damaged in (raw[:middle], raw[:middle] + bytes(50) + raw[middle + 50 :], b"other things"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot read the corpus") as caught:
            list(load_documents(config))
        assert "corpus.files" in caught.value.hint
        assert "corpus.name" not in caught.value.hint


def zipped(raw: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", raw)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("source", "empty"),
    [
        ("json", {"a.jsonl": b"", "a.jsonl.gz": gzip.compress(b""), "a.jsonl.zip": b""}),
        ("text", {"a.txt": b"", "a.txt.bz2": b""}),
    ],
)
def test_an_empty_file_among_others_has_no_documents(
    source: str, empty: dict[str, bytes], tmp_path: Path
) -> None:
    files = {**empty, "b": b'{"text": "one"}\n'}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    config = CorpusConfig(source=source, files=tuple(str(tmp_path / name) for name in files))
    assert len(list(load_documents(config))) == 1


def test_a_hub_data_set_that_is_a_script_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("")
    config = CorpusConfig(source="hub", name=str(tmp_path / "scripted"))
    with pytest.raises(ConfigError, match="scripts are no longer supported") as caught:
        list(load_documents(config))
    assert "a script cannot be read" in caught.value.hint


def test_a_sample_of_the_corpus_has_its_share_of_every_split() -> None:
    """Sampling and splitting both go by hash; they must not be the same hash."""
    config = CorpusConfig(source="python", max_documents=400, valid_fraction=0.2, test_fraction=0.3)
    sources = {document.source for document in load_documents(config)}
    splits = Counter(split_of(source, config, router_fraction=0.25) for source in sources)
    shares = {split: count / len(sources) for split, count in splits.items()}
    wanted = {"train": 0.25, "valid": 0.2, "test": 0.3, "router": 0.25}
    assert shares == pytest.approx(wanted, abs=0.1)


@given(st.text(), st.floats(0, 0.5))
def test_router_data_is_taken_from_training_only(source: str, router_fraction: float) -> None:
    before, after = (split_of(source, EMBEDDED, fraction) for fraction in (0.0, router_fraction))
    assert before == after or (before, after) == ("train", "router")
