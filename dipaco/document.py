"""One document of a corpus, what it is for, and how long texts become several."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "valid", "test", "router"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document. `source` names where it was cut from; all of one source is on one side."""

    text: str
    source: str
    kind: str


def text_hash(text: str) -> int:
    """64 bits of SHA-256: the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
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
