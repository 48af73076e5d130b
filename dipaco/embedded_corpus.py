"""Text that every Python installation has, of clearly different kinds.

The code of the standard library, its documentation strings, the pydoc topics, and the C and C++
headers, licences and descriptions of the installed packages. The same installation gives the same
documents in the same order.
"""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from dipaco.document import Document, pieces, text_hash

_NEVER_TEXT = frozenset({"__pycache__"})
_NOT_LIBRARY = _NEVER_TEXT | {"site-packages", "dist-packages", "test", "tests"}
# What a file holds beyond this is mostly generated tables, and slow to parse.
_MAX_FILE_BYTES = 2**18

_Reader = Callable[[], str]


def embedded_documents(max_document_bytes: int) -> Iterator[Document]:
    """All kinds in turn, always the one with the fewest bytes so far.

    Within a kind, sources come in the order of their hash, so that any number of documents is
    a fair sample and not the head of the alphabet.
    """
    kinds = {
        kind: iter(sorted(sources, key=lambda entry: text_hash(entry[0])))
        for kind, sources in _sources().items()
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
        for piece in pieces([text], max_document_bytes):
            yield Document(text=piece, source=source, kind=kind)


def _sources() -> dict[str, list[tuple[str, _Reader]]]:
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
