"""Documents to rows of tokens, in one file per split.

A document, ended by the end token, is cut into rows of `sequence_tokens`. Each row is a
sequence of its own: it has its own prefix and is routed on its own. The file of a split is plain
`.npy`, uint16 [n, T], written as the documents come and mapped to be read, so that neither needs
memory for more than one document.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np

from dipaco.checkpoint import replacing
from dipaco.document import Split
from dipaco.errors import BadBytes, ConfigError
from dipaco.shards import Rows

SPLITS: tuple[Split, ...] = get_args(Split)
SEQUENCES_DIR = "sequences"


def rows_of(
    tokens: Sequence[int],
    *,
    sequence_tokens: int,
    prefix_tokens: int,
    end_token: int,
    pad_token: int,
) -> Rows:
    """Rows [n, sequence_tokens] of one document, in order; n may be 0.

    What is left of a document is padded if it is at least twice as long as the prefix, so that
    there is something to score; otherwise it is dropped.
    """
    num_rows, rest = divmod(len(tokens) + 1, sequence_tokens)
    padded = np.full((num_rows + 1) * sequence_tokens, pad_token, dtype=np.uint16)
    padded[: len(tokens)] = tokens
    padded[len(tokens)] = end_token
    if rest >= 2 * prefix_tokens:
        num_rows += 1
    return padded.reshape(-1, sequence_tokens)[:num_rows]


def write_sequences(
    directory: Path,
    documents_tokens: Iterable[tuple[Split, Sequence[int]]],
    *,
    sequence_tokens: int,
    prefix_tokens: int,
    end_token: int,
    pad_token: int,
) -> list[Path]:
    """Write the rows of the documents, in order, to the file of their split; returns the files.

    All files are written, or none. A split may be without rows, but it is a ConfigError if there
    is nothing to train or to validate on.
    """
    (directory / SEQUENCES_DIR).mkdir(parents=True, exist_ok=True)
    files = {split: _file(directory, split) for split in SPLITS}
    num_rows = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        streams = {split: stack.enter_context(replacing(file)) for split, file in files.items()}
        for stream in streams.values():
            _write_header(stream, 0, sequence_tokens)
        for split, tokens in documents_tokens:
            rows = rows_of(
                tokens,
                sequence_tokens=sequence_tokens,
                prefix_tokens=prefix_tokens,
                end_token=end_token,
                pad_token=pad_token,
            )
            streams[split].write(rows.tobytes())
            num_rows[split] += len(rows)
        for split, stream in streams.items():
            stream.seek(0)
            _write_header(stream, num_rows[split], sequence_tokens)
        for split in ("train", "valid"):
            if not num_rows[split]:
                raise ConfigError(
                    f"no {split} document is as long as {2 * prefix_tokens} tokens",
                    hint="use longer documents, or more of them, or lower routing.prefix_tokens",
                )
    return list(files.values())


def read_split(directory: Path, split: Split) -> Rows:
    """The rows [n, T] of a split, mapped and read-only; BadBytes if the file is not what it
    should be.
    """
    file = _file(directory, split)
    try:
        rows = np.lib.format.open_memmap(file, mode="r")
        if rows.dtype != np.uint16 or rows.ndim != 2:
            raise ValueError(f"it holds {rows.dtype} of shape {rows.shape}")
    except Exception as error:  # a header is parsed as Python, and fails in as many ways
        raise BadBytes(
            f"{SEQUENCES_DIR}/{file.name} is damaged: {error}",
            hint="delete it and prepare the run again",
        ) from error
    return rows


def _file(directory: Path, split: Split) -> Path:
    return directory / SEQUENCES_DIR / f"{split}.npy"


def _write_header(stream: BinaryIO, num_rows: int, sequence_tokens: int) -> None:
    """The header of an array; numpy leaves room in it, so its length is always the same."""
    np.lib.format.write_array_header_1_0(
        stream,
        {"descr": "<u2", "fortran_order": False, "shape": (num_rows, sequence_tokens)},
    )
