"""Documents, in one order, from the embedded corpus or through the `datasets` library."""

from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from dipaco.config import CorpusConfig
from dipaco.document import Document, Split, pieces, text_hash
from dipaco.embedded_corpus import embedded_documents
from dipaco.errors import ConfigError

_MAX_RECENT = 2**18  # hashes of texts

# Each open file takes some ten megabytes, and a row of Parquet comes with those around it.
_FILES_AT_ONCE = 8
_LINES_AT_ONCE = 256
_READING: Mapping[str, Mapping[str, object]] = {
    "text": {"sample_by": "line", "keep_linebreaks": True, "chunksize": 2**20},
    "parquet": {"batch_size": 256},
}


def load_documents(config: CorpusConfig) -> Iterator[Document]:
    """At most `max_documents` distinct documents of at most `max_document_bytes` each.

    They are read as they are asked for, and forgotten; of each, about 8 bytes stay, to tell
    its doubles. ConfigError if the corpus cannot be read.
    """
    found = (
        embedded_documents(config.max_document_bytes)
        if config.source == "python"
        else _from_datasets(config)
    )
    seen = _Seen()
    distinct = (document for document in found if seen.add(document.text.strip()))
    yield from islice(distinct, config.max_documents)


def split_of(source: str, config: CorpusConfig, router_fraction: float) -> Split:
    """What documents of this source are for: the same answer everywhere.

    A larger fraction takes sources only from the splits after it, and from training.
    """
    held_out: tuple[Split, ...] = ("valid", "test", "router")
    ends = accumulate((config.valid_fraction, config.test_fraction, router_fraction))
    place = text_hash(f"validation: {source}")
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
        digest = text_hash(text)
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
    numbered: Iterator[tuple[int, str]]
    if config.source == "text":
        numbered = enumerate(pieces(texts, config.max_document_bytes))
    else:
        numbered = (
            (number, piece)
            for number, text in enumerate(texts)
            for piece in pieces([text], config.max_document_bytes)
        )
    for number, piece in numbered:
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
    """The rows of a table; of a text file, some lines at a time; of an empty file none."""
    from datasets import config as datasets_config
    from datasets import load_dataset

    is_local = config.source != "hub"
    if is_local and Path(name).is_file() and not Path(name).stat().st_size:
        return
    # Otherwise the library tells its hub each time somebody reads a local file.
    datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False
    options: dict[str, Any] = {"split": config.split, "streaming": True}
    arguments: tuple[str, str | None]
    if is_local:
        arguments = (config.source, None)
        options["data_files"] = {config.split: name}
        options.update(_READING.get(config.source, {}))
    else:
        arguments = (name, config.config or None)
    try:
        rows = load_dataset(*arguments, **options)
        if config.source == "text":
            # Lines are many and short: a dictionary for each would take longer than all the rest.
            for table in rows.with_format("arrow").iter(batch_size=_LINES_AT_ONCE):
                yield {"text": "".join(table["text"].to_pylist())}
        else:
            yield from rows
    except StopIteration:  # what the library makes of JSON lines that there are none of
        return
    except Exception as error:  # of any decompressor, parser or network library, each with its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"cannot read the corpus {name}: {reason:.200}", hint=_HINT if is_local else _HUB_HINT
        ) from error


_HINT = "check corpus.files: each must be whole, and of the kind that corpus.source says"
_HUB_HINT = (
    "check corpus.name, corpus.config, corpus.split and the network; a data set that is a script "
    "cannot be read"
)
