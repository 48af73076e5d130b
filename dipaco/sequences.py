"""Documents to rows of tokens.

A document, ended by the end token, is cut into rows of `sequence_tokens`. Each row is a
sequence of its own: it has its own prefix and is routed on its own.
"""

from collections.abc import Iterable

import numpy as np

from dipaco.errors import ConfigError
from dipaco.shards import Rows


def rows_of(
    documents_tokens: Iterable[list[int]],
    *,
    sequence_tokens: int,
    prefix_tokens: int,
    end_token: int,
    pad_token: int,
) -> Rows:
    """Rows [n, sequence_tokens] of the documents, in order.

    What is left of a document is padded if it is at least twice as long as the prefix, so that
    there is something to score; otherwise it is dropped. ConfigError if nothing is left at all.
    """
    rows = []
    for tokens in documents_tokens:
        ended = [*tokens, end_token]
        for start in range(0, len(ended), sequence_tokens):
            row = ended[start : start + sequence_tokens]
            if len(row) >= 2 * prefix_tokens:
                rows.append(row + [pad_token] * (sequence_tokens - len(row)))
    if not rows:
        raise ConfigError(
            f"no document is as long as {2 * prefix_tokens} tokens",
            hint="use longer documents, or more of them, or lower routing.prefix_tokens",
        )
    return np.array(rows, dtype=np.uint16)
