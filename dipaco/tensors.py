"""Tensors as bytes: safetensors with a layout known beforehand.

Digests name these bytes, so the same tensors must give the same bytes on every machine and
under every release of the safetensors library: the header is written here, without metadata,
in the one form that library also writes (a test compares them). And since the reader knows the
layout, it compares sizes and the whole header before it touches a value; nothing in the bytes
can make it allocate more than it expects.
"""

import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER_BYTES = 2**22  # the optimizer of a very deep network has some ten thousand tensors
_ALIGNMENT_BYTES = 8  # safetensors pads its header with spaces to a multiple of this

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of each tensor, with its dtype and shape."""


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as safetensors; they must be on the CPU."""
    return b"".join(encoded_pieces(tensors))


def encoded_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """`encode_tensors` in pieces, header and values, without a copy of the values."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return [encode_header(layout), *(_bytes_of(tensors[name]) for name in _ordered(layout))]


def encode_header(layout: Layout) -> bytes:
    """What comes before the values, for writers who do not have all of them in memory: these
    follow in the order of the dtypes' widths, widest first, then of the names.
    """
    entries = {}
    start = 0
    for name in _ordered(layout):
        dtype, shape = layout[name]
        end = start + _num_bytes(dtype, shape)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def encoded_bytes(layout: Layout) -> int:
    """Exact length of `encode_tensors` of tensors of this layout."""
    return len(encode_header(layout)) + sum(_num_bytes(*entry) for entry in layout.values())


def decode_tensors(raw: bytes | memoryview, layout: Layout) -> dict[str, Tensor]:
    """The inverse of `encode_tensors`; ValueError if `raw` is of any other layout.

    The tensors own their memory. Their values are not looked at.
    """
    bodies = split_tensors(raw, layout)
    return {name: _tensor_of(bodies[name], *layout[name]) for name in bodies}


def split_tensors(raw: bytes | memoryview, layout: Layout) -> dict[str, memoryview]:
    """The bytes of each tensor, without copying them; ValueError as `decode_tensors`."""
    header = encode_header(layout)
    expected = encoded_bytes(layout)
    view = memoryview(raw).cast("B")
    if len(view) != expected:
        raise ValueError(f"{len(view)} bytes, expected {expected}")
    if bytes(view[: len(header)]) != header:
        raise ValueError("names, dtypes or shapes of the tensors are not the expected ones")
    bodies = {}
    start = len(header)
    for name in _ordered(layout):
        end = start + _num_bytes(*layout[name])
        bodies[name] = view[start:end]
        start = end
    return bodies


def layout_of(raw: bytes | memoryview) -> Layout:
    """The layout that `raw` claims to have, for readers who do not know it; `decode_tensors`
    then checks the claim. ValueError if there is none.
    """
    try:
        length = int.from_bytes(raw[:8], "little")
        if length > min(_MAX_HEADER_BYTES, len(raw) - 8):
            raise ValueError("no header")
        entries = json.loads(bytes(raw[8 : 8 + length]))
        return {
            name: (_DTYPES[entry["dtype"]], tuple(_dimension(n) for n in entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not safetensors: {error!r:.80}") from error


def _dimension(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError("not a shape")
    return value


def _ordered(layout: Layout) -> list[str]:
    """The order in which safetensors lays tensors out: wide dtypes first, then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _tensor_of(raw: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(raw):
        return torch.empty(shape, dtype=dtype)  # no bytes have no stride to view them by
    copied = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())
    return copied.view(dtype).reshape(shape)


def new_vector(num_values: int) -> Tensor:
    """A float32 vector on the CPU, its values arbitrary.

    From numpy, which asks for large pages: touching so much memory anew is half of the work.
    """
    return torch.from_numpy(np.empty(num_values, np.float32))


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; one pass without a temporary, because NaN wins any minimum."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite()) and bool(high.isfinite())
