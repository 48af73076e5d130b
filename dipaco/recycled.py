"""Memory of large states that nobody refers to any more, used again for the next ones.

The system hands out new memory page by page, each filled with zeros first, and now and then moves
other pages about for it: for a state that is half of what computing it costs. So the memory of the
version before last becomes that of the next one.
"""

import ctypes
import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

MAX_SPARE = 2  # blocks kept: of one path there are hardly more large modules than that
_MIN_BYTES = 2**20  # less is not worth keeping

_spare: "deque[Bytes]" = deque(maxlen=MAX_SPARE)  # any thread may give back, at any instant


def recycled(num_bytes: int) -> "Bytes":
    """Memory with arbitrary content, which comes back here once no array or view shows it."""
    memory = _take(num_bytes)
    if memory is None:
        # From numpy, which asks for large pages.
        memory = np.empty(num_bytes, dtype=np.uint8)
    if num_bytes < _MIN_BYTES:
        return memory
    # Arrays that are made of a buffer keep the buffer's owner alive, not one another.
    owner = (ctypes.c_uint8 * num_bytes).from_buffer(memory.data)
    weakref.finalize(owner, _spare.append, memory).atexit = False
    return np.frombuffer(memoryview(owner), np.uint8)


def _take(num_bytes: int) -> "Bytes | None":
    for _ in range(MAX_SPARE):
        try:
            memory = _spare.popleft()
        except IndexError:
            return None
        if len(memory) == num_bytes:
            return memory
        _spare.append(memory)
    return None
