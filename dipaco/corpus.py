"""Documents, in one order, from the embedded corpus or through the `datasets` library.

The embedded corpus ("python") is text that every Python installation has, of clearly different
kinds: the code of the standard library, its documentation strings, the pydoc topics, and the
C and C++ headers, licences and descriptions of the installed packages. The same installation
gives the same documents in the same order.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dipaco.config import CorpusConfig
from dipaco.errors import ConfigError

_NEVER_TEXT = frozenset({"__pycache__"})
_NOT_LIBRARY = _NEVER_TEXT | {"site-packages", "dist-packages", "test", "tests"}
# What a file holds beyond this is mostly generated tables, and slow to parse.
_MAX_FILE_BYTES = 2**18

_MAX_RECENT = 2**18  # hashes of texts

# Each open file takes some ten megabytes, and a row of Parquet comes with those around it.
_FILES_AT_ONCE = 8
_LINES_AT_ONCE = 256
_READING: Mapping[str, Mapping[str, object]] = {
    "text": {"sample_by": "line", "keep_linebreaks": True, "chunksize": 2**20},
    "parquet": {"batch_size": 256},
}

Split = Literal["train", "valid", "test", "router"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document. `source` names where it was cut from; all of one source is on one side."""

    text: str
    source: str
    kind: str


def load_documents(config: CorpusConfig) -> Iterator[Document]:
    """At most `max_documents` distinct documents of at most `max_document_bytes` each.

    They are read as they are asked for, and forgotten; of each, about 8 bytes stay, to tell
    its doubles. ConfigError if the corpus cannot be read.
    """
    found = _embedded(config) if config.source == "python" else _from_datasets(config)
    seen = _Seen()
    distinct = (document for document in found if seen.add(document.text.strip()))
    yield from islice(distinct, config.max_documents)


def split_of(source: str, config: CorpusConfig, router_fraction: float) -> Split:
    """What documents of this source are for: the same answer everywhere.

    A larger fraction takes sources only from the splits after it, and from training.
    """
    held_out: tuple[Split, ...] = ("valid", "test", "router")
    ends = accumulate((config.valid_fraction, config.test_fraction, router_fraction))
    place = _hash(f"validation: {source}")
    return next(
        (split for split, end in zip(held_out, ends, strict=True) if place < end * 2**64), "train"
    )


class _Seen:
    """The texts there were, as 64-bit hashes: hardly two of a billion texts have the same one.

    The latest are in a set, at some 70 bytes each. Whenever there are `_MAX_RECENT`, they go into
    a sorted array, at 8 bytes each (16 at that moment, when it is copied).
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.empty(0, dtype=np.uint64)

    def add(self, text: str) -> bool:
        """Whether this text is a new one; the empty text never is."""
        digest = _hash(text)
        if not text or digest in self._recent or self._is_sorted(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) >= _MAX_RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64)
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True

    def _is_sorted(self, digest: int) -> bool:
        # As a plain integer it would make numpy convert the whole array.
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        return place < len(self._sorted) and int(self._sorted[place]) == digest


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def _pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Join the texts and cut them at line ends into pieces of at most `max_bytes`; longer lines
    are cut too.
    """
    piece: list[str] = []
    size = 0
    for text in texts:
        fits = size + _num_bytes(text) <= max_bytes
        for part in [text] if fits else _short_parts(text, max_bytes):
            length = _num_bytes(part)
            if size + length > max_bytes:
                yield "".join(piece)
                piece, size = [], 0
            piece.append(part)
            size += length
    if piece:
        yield "".join(piece)


def _short_parts(text: str, max_bytes: int) -> Iterator[str]:
    """The lines of a text, cut where they are longer."""
    step = max_bytes // 4  # a character has at most four bytes
    for line in text.splitlines(keepends=True):
        if _num_bytes(line) <= max_bytes:
            yield line
        else:
            yield from (line[start : start + step] for start in range(0, len(line), step))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


# --- Text, JSON lines, Parquet and the hub, all through `datasets` --------------------------


def _from_datasets(config: CorpusConfig) -> Iterator[Document]:
    """Documents of the first files in turn, so that any number of them is a fair sample; when one
    ends, the next begins.
    """
    names = iter(config.files or (config.name,))
    open_files = [_documents_of(config, name) for name in islice(names, _FILES_AT_ONCE)]
    while open_files:
        document = next(open_files[0], None)
        if document is not None:
            yield document
            open_files.append(open_files.pop(0))
        else:
            open_files[:1] = [_documents_of(config, name) for name in islice(names, 1)]


def _documents_of(config: CorpusConfig, name: str) -> Iterator[Document]:
    """A row is one source; a text file, which may be the whole corpus, is one per document.

    A source is named by its file, not by where the file lies: moving a corpus splits it no other
    way.
    """
    texts = _texts(config, name)
    pieces: Iterator[tuple[int, str]]
    if config.source == "text":
        pieces = enumerate(_pieces(texts, config.max_document_bytes))
    else:
        pieces = (
            (number, piece)
            for number, text in enumerate(texts)
            for piece in _pieces([text], config.max_document_bytes)
        )
    for number, piece in pieces:
        yield Document(text=piece, source=f"{Path(name).name}#{number}", kind=name)


def _texts(config: CorpusConfig, name: str) -> Iterator[str]:
    """The text of every row that has one."""
    for row in _rows(config, name):
        text = row.get(config.text_column, ...)
        if text is None:
            continue
        if not isinstance(text, str):
            raise ConfigError(
                f"{name} has no text column {config.text_column!r}",
                hint=f"set corpus.text_column to one of: {', '.join(map(str, row))}",
            )
        yield text


def _rows(config: CorpusConfig, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table; of a text file, some lines at a time."""
    from datasets import config as datasets_config
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    # Otherwise the library tells its hub each time somebody reads a local file.
    datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False
    options: dict[str, Any] = {"split": config.split, "streaming": True}
    if config.source == "hub":
        arguments = (name, config.config or None)
    else:
        arguments = (config.source, None)
        options["data_files"] = {config.split: name}
        options.update(_READING.get(config.source, {}))
    try:
        rows = load_dataset(*arguments, **options)
        if config.source == "text":
            # Lines are many and short: a dictionary for each would take longer than all the rest.
            for table in rows.with_format("arrow").iter(batch_size=_LINES_AT_ONCE):
                yield {"text": "".join(table["text"].to_pylist())}
        else:
            yield from rows
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read the corpus {name}: {reason:.200}",
            hint="check corpus.files, or corpus.name, corpus.config, corpus.split and the network",
        ) from error


# --- The embedded corpus ---------------------------------------------------------------------

_Reader = Callable[[], str]


def _embedded(config: CorpusConfig) -> Iterator[Document]:
    """The embedded corpus as an IterableDataset, like every other one."""
    from datasets import IterableDataset

    rows = IterableDataset.from_generator(
        _embedded_rows, gen_kwargs={"max_document_bytes": config.max_document_bytes}
    )
    for row in rows:
        yield Document(text=row["text"], source=row["source"], kind=row["kind"])


def _embedded_rows(max_document_bytes: int) -> Iterator[dict[str, str]]:
    """All kinds in turn, always the one with the fewest bytes so far.

    Within a kind, sources come in the order of their hash, so that any number of documents is
    a fair sample and not the head of the alphabet.
    """
    kinds = {
        kind: iter(sorted(sources, key=lambda entry: _hash(entry[0])))
        for kind, sources in _embedded_sources().items()
    }
    num_bytes = dict.fromkeys(kinds, 0)
    while kinds:
        kind = min(kinds, key=lambda name: (num_bytes[name], name))
        source, read = next(kinds[kind], ("", None))
        if read is None:
            del kinds[kind]
            continue
        text = read()
        num_bytes[kind] += len(text) + 1
        for piece in _pieces([text], max_document_bytes):
            yield {"text": piece, "source": source, "kind": kind}


def _embedded_sources() -> dict[str, list[tuple[str, _Reader]]]:
    """By kind: the name of each source, and what reads it."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    include = Path(sysconfig.get_path("include"))
    python_files = [
        (name, file) for name, file in _files(library, skipped=_NOT_LIBRARY) if name.endswith(".py")
    ]
    installed = dict(_files(include))
    for scheme in ("purelib", "platlib"):
        installed |= _files(Path(sysconfig.get_path(scheme)))
    return {
        "code": [(name, partial(_code, file)) for name, file in python_files],
        "docstrings": [(name, partial(_docstrings, file)) for name, file in python_files],
        "topics": [(f"topic {key}", partial(str, text)) for key, text in topics.items()],
        "headers": _plain_sources(installed, r".*\.(h|hpp|cuh)"),
        "licences": _plain_sources(installed, r".*\.dist-info/(.*/)?(LICEN[CS]E|COPYING|NOTICE).*"),
        "descriptions": _plain_sources(installed, r".*\.dist-info/METADATA"),
    }


def _plain_sources(files: dict[str, Path], pattern: str) -> list[tuple[str, _Reader]]:
    wanted = re.compile(pattern)
    return [(name, partial(_read, file)) for name, file in files.items() if wanted.fullmatch(name)]


def _files(root: Path, *, skipped: frozenset[str] = _NEVER_TEXT) -> Iterator[tuple[str, Path]]:
    """Files under `root`, by a name that does not depend on where `root` is."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            file = os.path.join(folder, name)
            yield os.path.relpath(file, root), Path(file)


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(_MAX_FILE_BYTES).decode(errors="replace")


def _code(file: Path) -> str:
    return _split_python(file)[0]


def _docstrings(file: Path) -> str:
    return _split_python(file)[1]


@lru_cache(maxsize=256)  # code and docstrings of one file are read close to one another
def _split_python(file: Path) -> tuple[str, str]:
    """The code of a file without its documentation strings, and these, apart."""
    text = _read(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in the standard library
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return text, ""
    lines = text.splitlines(keepends=True)
    docstrings = []
    for node in _definitions(tree):
        found = _docstring_of(node)
        if found is not None:
            start, end, docstring = found
            docstrings.append((start, docstring))
            lines[start:end] = [""] * (end - start)
    return "".join(lines), "\n\n".join(docstring for _, docstring in sorted(docstrings))


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: _Definition) -> Iterator[_Definition]:
    """A module, its classes and functions, and theirs; those inside other statements are few."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child)


def _docstring_of(node: _Definition) -> tuple[int, int, str] | None:
    """First line (from 0), line after the last, and cleaned text of a node's docstring."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return None
    expression = node.body[0]
    return expression.lineno - 1, expression.end_lineno or expression.lineno, docstring
