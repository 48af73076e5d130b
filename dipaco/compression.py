"""Outer gradients on the wire: float32, float16, or 8-bit blocks, with error feedback.

The 8-bit format is the dynamic one of Dettmers (arXiv 2110.02861): each block of 256 values is
divided by its largest magnitude and rounded to one of 256 values of a table. The kernels of
bitsandbytes round; decoding is a table lookup and one float32 multiplication, done here, so
that it gives the same bits on every machine.
"""

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dipaco.errors import BadContribution
from dipaco.tensors import Layout, decode_tensors, encode_tensors, is_finite
from dipaco.tensors import encoded_bytes as bytes_of_layout

WireFormat = Literal["float32", "float16", "int8", "int4"]

BLOCK_VALUES = 256  # one 4-byte scale per 256 bytes costs 1.6 %; larger blocks lose small values
_MAX_FLOAT16 = 65504.0
_LOOKUP_VALUES = 2**16


def encode(vector: Tensor, wire_format: WireFormat) -> bytes:
    """A 1-D float32 CPU vector as safetensors; BadContribution if a value is not finite."""
    if not is_finite(vector):
        raise BadContribution(
            "an outer gradient is not finite", hint="training has diverged; lower the learning rate"
        )
    if wire_format == "float32":
        return encode_tensors({"values": vector})
    if wire_format == "float16":
        return encode_tensors({"values": vector.clamp(-_MAX_FLOAT16, _MAX_FLOAT16).half()})
    return encode_tensors(_quantize(vector))


def decode(raw: bytes | memoryview, wire_format: WireFormat, *, num_parameters: int) -> Tensor:
    """The 1-D float32 vector that `raw` stands for, the same bits everywhere.

    BadContribution if it is not `num_parameters` finite values in this format; the size is
    checked before anything else.
    """
    try:
        tensors = decode_tensors(raw, _layout(wire_format, num_parameters))
    except ValueError as error:
        raise BadContribution(f"not an outer gradient: {error}") from error
    vector = _dequantize(tensors) if wire_format == "int8" else tensors["values"].float()
    if not is_finite(vector):
        raise BadContribution("not an outer gradient: a value is not finite")
    return vector


def encoded_bytes(wire_format: WireFormat, num_parameters: int) -> int:
    """Exact length of an encoded vector."""
    return bytes_of_layout(_layout(wire_format, num_parameters))


def compress_with_feedback(
    gradient: Tensor, residual: Tensor | None, wire_format: WireFormat
) -> tuple[bytes, Tensor | None]:
    """Encode `gradient` plus what earlier rounds lost; return the bytes and what is lost now.

    `residual` is what the last call returned for this module, or None at the beginning. float32
    loses nothing, so its residual is None.
    """
    corrected = gradient if residual is None else gradient + residual
    raw = encode(corrected, wire_format)
    if wire_format == "float32":
        return raw, None
    return raw, corrected - decode(raw, wire_format, num_parameters=gradient.numel())


def warm_up(wire_format: WireFormat) -> None:
    """Load what the first `encode` would have to load, which takes seconds for int8."""
    encode(torch.zeros(BLOCK_VALUES), wire_format)


@cache
def dynamic_table() -> Tensor:
    """The 256 values of the dynamic 8-bit format, ascending, in [-1, 1]; float32.

    Seven decades; decade i (1e-6 to 1) is divided evenly between 0.1 and 1 into 2**i values, each
    in both signs; then 0 and 1. Defined here rather than taken from a library, because decoded
    bits depend on it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        width = 0.9 / 2**decade
        for index in range(2**decade):
            value = 10.0 ** (decade - 6) * (0.1 + width * (index + 0.5))
            values += [value, -value]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize(vector: Tensor) -> dict[str, Tensor]:
    # The package, not its `functional`: that one is there before the kernels are, and a thread that
    # asks for it while another one still imports the package would find none.
    import bitsandbytes

    values, state = bitsandbytes.functional.quantize_blockwise(
        vector, code=dynamic_table(), blocksize=BLOCK_VALUES
    )
    return {"values": values.view(-1), "scales": state.absmax.view(-1)}


def _dequantize(tensors: dict[str, Tensor]) -> Tensor:
    values, scales = tensors["values"], tensors["scales"]
    vector = torch.empty(len(values), dtype=torch.float32)
    table, indices, looked_up = dynamic_table().numpy(), values.numpy(), vector.numpy()
    # numpy's take, a cache's worth at a time, is three times faster than torch's.
    for start in range(0, len(values), _LOOKUP_VALUES):
        part = slice(start, start + _LOOKUP_VALUES)
        np.take(table, indices[part], out=looked_up[part], mode="clip")
    whole = len(values) // BLOCK_VALUES
    vector[: whole * BLOCK_VALUES].view(-1, BLOCK_VALUES).mul_(scales[:whole, None])
    if whole < len(scales):
        vector[whole * BLOCK_VALUES :].mul_(scales[whole])
    return vector


def _layout(wire_format: WireFormat, num_parameters: int) -> Layout:
    shape = (num_parameters,)
    if wire_format == "int8":
        num_blocks = math.ceil(num_parameters / BLOCK_VALUES)
        return {"values": (torch.uint8, shape), "scales": (torch.float32, (num_blocks,))}
    return {"values": (getattr(torch, wire_format), shape)}
