"""Outer gradients on the wire: float32, float16, or 8-bit or 4-bit blocks, with error feedback.

The 8-bit format is the dynamic one of Dettmers (arXiv 2110.02861): each block of 256 values is
divided by its largest magnitude and rounded to one of 256 values of a table. The kernels of
bitsandbytes round.

The 4-bit format divides each block of 64 values by the value of largest magnitude, sign included
(BOF4-S, arXiv 2505.06653), so that 1 needs a place in the table of 16 values but -1 does not. Two
values make a byte, the first in its low half.

Decoding either is a table lookup and one float32 multiplication, done here, so that it gives the
same bits on every machine.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dipaco.errors import BadContribution
from dipaco.tensors import Layout, decode_tensors, encode_tensors, is_finite
from dipaco.tensors import encoded_bytes as bytes_of_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

WireFormat = Literal["float32", "float16", "int8", "int4"]

BLOCK_VALUES: dict[WireFormat, int] = {
    "int8": 256,  # one 4-byte scale per 256 bytes costs 1.6 %; larger blocks lose small values
    "int4": 64,  # one 2-byte scale per 32 bytes costs 6 %; with 128 the error grows by 4 to 20 %
}
_MAX_FLOAT16 = 65504.0
_MAX_BFLOAT16 = torch.finfo(torch.bfloat16).max
_LEAST_SCALE = 2.0**-100  # 127.5 / scale stays finite, and no decoded value is denormal
_PART_VALUES = 2**17  # worked on at a time, so that they stay in a cache


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
    return encode_tensors(_quantize(vector, wire_format))


def decode(raw: bytes | memoryview, wire_format: WireFormat, *, num_parameters: int) -> Tensor:
    """The 1-D float32 vector that `raw` stands for, the same bits everywhere.

    BadContribution if it is not `num_parameters` finite values in this format; the size is
    checked before anything else.
    """
    try:
        tensors = decode_tensors(raw, _layout(wire_format, num_parameters))
    except ValueError as error:
        raise BadContribution(f"not an outer gradient: {error}") from error
    # The tables are finite, so that finite scales make finite values.
    if not is_finite(tensors.get("scales", tensors["values"])):
        raise BadContribution("not an outer gradient: a value is not finite")
    if wire_format not in BLOCK_VALUES:
        return tensors["values"].float()
    vector = _dequantize(tensors["values"], tensors["scales"].float(), wire_format)
    return vector[:num_parameters]


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
    encode(torch.zeros(1), wire_format)


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


@cache
def four_bit_table() -> Tensor:
    """The 16 values of the 4-bit format, ascending, in (-1, 1]; float32, exact.

    Lloyd's algorithm ends near these on the outer gradients of small language models, and on
    normal values. What they lose of an outer gradient is 7 to 8 % of its norm; of nf4 it is 9 %,
    of 15 even steps 7 to 10 %, of powers of two 18 %.
    """
    units = [-224, -179, -142, -110, -80, -53, -26, 0, 25, 50, 77, 104, 133, 166, 205, 256]
    return torch.tensor(units, dtype=torch.float32) / 256


def _quantize(vector: Tensor, wire_format: WireFormat) -> dict[str, Tensor]:
    return _quantize_8bit(vector) if wire_format == "int8" else _quantize_4bit(vector)


def _quantize_8bit(vector: Tensor) -> dict[str, Tensor]:
    # The package, not its `functional`: that one is there before the kernels are, and a thread that
    # asks for it while another one still imports the package would find none.
    import bitsandbytes

    values, state = bitsandbytes.functional.quantize_blockwise(
        vector, code=dynamic_table(), blocksize=BLOCK_VALUES["int8"]
    )
    return {"values": values.view(-1), "scales": state.absmax.view(-1)}


def _quantize_4bit(vector: Tensor) -> dict[str, Tensor]:
    """Round to 256 even steps, then two values at once to the nearest of the table.

    Four times faster than a search in the table, for 0.3 % more error. In numpy, because torch
    would wait some thousand times for its other threads, which have a network to train.
    """
    block_values = BLOCK_VALUES["int4"]
    num_blocks = math.ceil(len(vector) / block_values)
    packed = np.empty(num_blocks * block_values // 2, dtype=np.uint8)
    scales = np.empty(num_blocks, dtype=np.float32)
    values = vector.numpy()
    for start in range(0, len(values), _PART_VALUES):
        part = values[start : start + _PART_VALUES]
        if len(part) % block_values:
            part = np.pad(part, (0, -len(part) % block_values))
        blocks = part.reshape(-1, block_values)
        high, low = blocks.max(axis=1), blocks.min(axis=1)
        scale = np.where(high >= -low, high, low)
        scale[np.abs(scale) < _LEAST_SCALE] = 0.0
        first_block = start // block_values
        scales[first_block : first_block + len(blocks)] = scale
        factor = np.zeros_like(scale)
        np.divide(np.float32(127.5), scale, out=factor, where=scale != 0.0)
        steps = blocks * factor[:, None]
        steps += np.float32(128.0)
        pairs = steps.astype(np.uint8).reshape(-1).view(np.uint16)
        first_pair = start // 2
        found = packed[first_pair : first_pair + len(pairs)]
        np.take(_bytes_of_steps(), pairs, out=found, mode="clip")
    rounded = torch.from_numpy(scales).clamp_(-_MAX_BFLOAT16, _MAX_BFLOAT16).bfloat16()
    return {"values": torch.from_numpy(packed)[: math.ceil(len(values) / 2)], "scales": rounded}


@cache
def _bytes_of_steps() -> "NDArray[np.uint8]":
    """The byte of two values, by their steps: 0 to 255 for -1 to 1, the first in the low byte."""
    table = four_bit_table()
    middles = (torch.arange(256) - 127.5) / 127.5
    codes = torch.bucketize(middles, (table[1:] + table[:-1]) / 2).to(torch.uint8).numpy()
    found: NDArray[np.uint8] = (codes[None, :] | codes[:, None] << 4).reshape(-1)
    return found


@cache
def _values_of_bytes(wire_format: WireFormat) -> "NDArray[Any]":
    """What each byte stands for: one float32, or the eight bytes of two."""
    if wire_format == "int8":
        return dynamic_table().numpy()
    table, codes = four_bit_table().numpy(), np.arange(256)
    return np.stack([table[codes & 15], table[codes >> 4]], axis=1).view(np.uint64).reshape(-1)


def _dequantize(packed: Tensor, scales: Tensor, wire_format: WireFormat) -> Tensor:
    """The values of all bytes; of an odd number of 4-bit values, one more than there are."""
    table, block_values = _values_of_bytes(wire_format), BLOCK_VALUES[wire_format]
    values_per_byte = table.itemsize // 4
    vector = torch.empty(len(packed) * values_per_byte)
    indices, looked_up = packed.numpy(), vector.numpy().view(table.dtype)
    part_bytes = _PART_VALUES // values_per_byte
    # numpy's take is three times faster than torch's.
    for start in range(0, len(packed), part_bytes):
        part = slice(start, start + part_bytes)
        np.take(table, indices[part], out=looked_up[part], mode="clip")
    whole = len(vector) // block_values
    vector[: whole * block_values].view(-1, block_values).mul_(scales[:whole, None])
    if whole < len(scales):
        vector[whole * block_values :].mul_(scales[whole])
    return vector


def _layout(wire_format: WireFormat, num_parameters: int) -> Layout:
    shape = (num_parameters,)
    if wire_format not in BLOCK_VALUES:
        return {"values": (getattr(torch, wire_format), shape)}
    scales = (math.ceil(num_parameters / BLOCK_VALUES[wire_format]),)
    if wire_format == "int8":
        return {"values": (torch.uint8, shape), "scales": (torch.float32, scales)}
    packed = (math.ceil(num_parameters / 2),)
    return {"values": (torch.uint8, packed), "scales": (torch.bfloat16, scales)}
