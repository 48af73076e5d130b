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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from dipaco.config import CorpusConfig
from dipaco.errors import ConfigError

_NEVER_TEXT = frozenset({"__pycache__"})
_NOT_LIBRARY = _NEVER_TEXT | {"site-packages", "dist-packages", "test", "tests"}
# What a file holds beyond this is mostly generated tables, and slow to parse.
_MAX_FILE_BYTES = 2**18


Split = Literal["train", "valid", "test", "router"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document. `source` names where it was cut from; all of one source is on one side."""

    text: str
    source: str
    kind: str


def load_documents(config: CorpusConfig) -> Iterator[Document]:
    """At most `max_documents` distinct documents of at most `max_document_bytes` each.

    ConfigError if the corpus cannot be read.
    """
    found = _embedded(config) if config.source == "python" else _from_datasets(config)
    seen: set[bytes] = set()
    for document in found:
        digest = hashlib.sha256(document.text.strip().encode(errors="replace")).digest()
        if digest in seen or not document.text.strip():
            continue
        seen.add(digest)
        yield document
        if len(seen) == config.max_documents:
            return


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


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def _pieces(text: str, max_bytes: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most `max_bytes`; longer lines are cut too."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for part in _short_parts(line, max_bytes):
            length = len(part.encode(errors="replace"))
            if size + length > max_bytes:
                yield "".join(piece)
                piece, size = [], 0
            piece.append(part)
            size += length
    if piece:
        yield "".join(piece)


def _short_parts(line: str, max_bytes: int) -> list[str]:
    if len(line.encode(errors="replace")) <= max_bytes:
        return [line]
    step = max_bytes // 4  # a character has at most four bytes
    return [line[start : start + step] for start in range(0, len(line), step)]


# --- Text, JSON lines, Parquet and the hub, all through `datasets` --------------------------


def _from_datasets(config: CorpusConfig) -> Iterator[Document]:
    """Documents of all files in turn, so that any number of them is a fair sample."""
    waiting = [_documents_of(config, name) for name in config.files or (config.name,)]
    while waiting:
        document = next(waiting[0], None)
        if document is None:
            del waiting[0]
        else:
            yield document
            waiting.append(waiting.pop(0))


def _documents_of(config: CorpusConfig, name: str) -> Iterator[Document]:
    for number, row in enumerate(_rows(config, name)):
        text = row.get(config.text_column)
        if not isinstance(text, str):
            raise ConfigError(
                f"{name} has no text column {config.text_column!r}",
                hint=f"set corpus.text_column to one of: {', '.join(map(str, row))}",
            )
        for index, piece in enumerate(_pieces(text, config.max_document_bytes)):
            # A row is a source of its own, but a text file is one row, so its pieces are.
            part = index if config.source == "text" else number
            yield Document(text=piece, source=f"{name}#{part}", kind=name)


def _rows(config: CorpusConfig, name: str) -> Iterator[dict[str, Any]]:
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
        options |= {"data_files": {config.split: name}}
        if config.source == "text":
            options["sample_by"] = "document"
    try:
        yield from load_dataset(*arguments, **options)
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
        for piece in _pieces(text, max_document_bytes):
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
