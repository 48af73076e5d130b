"""The loops over outer gradients and module states, compiled by numba.

They decide values that must have the same bits on every machine. So everything is float32,
elementwise or added up in a fixed order, one operation at a time: without `fastmath` the compiler
neither reorders floating-point operations nor fuses a multiplication with an addition. Only
`encode_int4`, whose rounding matters to nobody but the sender, may leave out what concerns NaN.

All let go of the interpreter, and none starts threads: training has use for the other ones. They
are compiled at their first call, and the result is kept beside this file or in the user's cache.
This module takes a second to import, so whoever needs it does so in the function that does.
"""

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_compiled = njit(nogil=True, cache=True, error_model="numpy")
_compiled_without_nan = njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})


@_compiled
def decode_int4(
    packed: "NDArray[np.uint8]", scales: "Floats", pairs: "NDArray[np.float64]", out: "Floats"
) -> None:
    """Two values per byte, the low half first, times the scale of their block of 64.

    `pairs` has both values of each byte, as 8 bytes; `scales` is float32. Bytes may hold one value
    more than `out` does.
    """
    some = np.empty(64, np.float32)
    some_pairs = some.view(np.float64)
    for block in range(len(scales)):
        scale = scales[block]
        bytes_of_block = packed[32 * block : 32 * block + 32]
        values = out[64 * block : 64 * block + 64]
        for i in range(len(bytes_of_block)):
            some_pairs[i] = pairs[bytes_of_block[i]]
        for i in range(len(values)):
            values[i] = some[i] * scale


@_compiled
def add_int4(
    packed: "NDArray[np.uint8]",
    scales: "Floats",
    pairs: "NDArray[np.float64]",
    factor: np.float32,
    total: "Floats",
) -> None:
    """`decode_int4`, then `add_multiplied`, without going through memory."""
    some = np.empty(64, np.float32)
    some_pairs = some.view(np.float64)
    for block in range(len(scales)):
        scale = scales[block]
        bytes_of_block = packed[32 * block : 32 * block + 32]
        sums = total[64 * block : 64 * block + 64]
        for i in range(len(bytes_of_block)):
            some_pairs[i] = pairs[bytes_of_block[i]]
        for i in range(len(sums)):
            value = some[i] * scale
            product = value * factor
            sums[i] += product


@_compiled
def sum_of_squares_int4(
    packed: "NDArray[np.uint8]",
    scales: "Floats",
    squares: "NDArray[np.int32]",
    num_values: int,
) -> float:
    """Of all values, in units of the table: exact within a block, then block after block.

    `squares` has those of both values of each byte together, and of the first one alone.
    """
    total = 0.0
    for block in range(len(scales)):
        some = packed[32 * block : 32 * block + 32]
        units = np.int32(0)
        for i in range(len(some)):
            units += squares[0, some[i]]
        if block == len(scales) - 1 and num_values % 2:
            last = some[len(some) - 1]
            units += squares[1, last] - squares[0, last]
        scale = np.float64(scales[block])
        total += scale * scale * np.float64(units)
    return total


@_compiled
def decode_int8(
    codes: "NDArray[np.uint8]", scales: "Floats", table: "Floats", out: "Floats"
) -> None:
    """Values of a table, times the scale of their block of 256."""
    for block in range(len(scales)):
        scale = scales[block]
        some = codes[256 * block : 256 * block + 256]
        values = out[256 * block : 256 * block + 256]
        for i in range(len(some)):
            values[i] = table[some[i]] * scale


@_compiled_without_nan
def encode_int4(
    values: "Floats",
    codes_of_steps: "NDArray[np.uint8]",
    least_scale: np.float32,
    packed: "NDArray[np.uint8]",
    scales: "Floats",
) -> None:
    """Round blocks of 64 values: to 256 even steps of the value of largest magnitude. The byte for
    each pair of steps is given. `values` is whole blocks.
    """
    steps = np.empty(64, np.uint8)
    pairs_of_steps = steps.view(np.uint16)
    highs = np.empty(16, np.float32)
    lows = np.empty(16, np.float32)
    for block in range(len(scales)):
        some = values[64 * block : 64 * block + 64]
        # In 16 lanes first: the compiler makes vectors of that, and none of one long maximum.
        for i in range(16):
            highs[i] = max(max(some[i], some[16 + i]), max(some[32 + i], some[48 + i]))
            lows[i] = min(min(some[i], some[16 + i]), min(some[32 + i], some[48 + i]))
        high, low = highs[0], lows[0]
        for i in range(1, 16):
            high = max(high, highs[i])
            low = min(low, lows[i])
        scale = high if high >= -low else low
        if abs(scale) < least_scale:
            scale = np.float32(0.0)
        factor = np.float32(0.0) if scale == 0 else np.float32(127.5) / scale
        scales[block] = scale
        for i in range(64):
            steps[i] = np.uint8(np.int32(some[i] * factor + np.float32(128.0)))
        bytes_of_block = packed[32 * block : 32 * block + 32]
        for i in range(32):
            bytes_of_block[i] = codes_of_steps[pairs_of_steps[i]]


@_compiled
def add_multiplied(values: "Floats", factor: np.float32, out: "Floats") -> None:
    """`out` += `values` * `factor`, each product rounded before it is added."""
    for i in range(len(values)):
        product = values[i] * factor
        out[i] += product


@_compiled
def add_squares(values: "Floats", lanes: "NDArray[np.float64]") -> None:
    """Add the squares, which are exact in float64, to the lanes one after another."""
    for start in range(0, len(values), len(lanes)):
        some = values[start : start + len(lanes)]
        for lane in range(len(some)):
            value = np.float64(some[lane])
            lanes[lane] += value * value


@_compiled
def nesterov(
    old: "Floats",
    old_momentum: "Floats",
    gradient: "Floats",
    rates: "Floats",
    parameters: "Floats",
    momentum: "Floats",
) -> None:
    """m' = mu m + g and theta' = theta - lr (g + mu m'), with `rates` = (lr, mu)."""
    lr, mu = rates
    for i in range(len(gradient)):
        decayed = old_momentum[i] * mu
        moved = decayed + gradient[i]
        ahead = moved * mu
        change = ahead + gradient[i]
        step = change * lr
        momentum[i] = moved
        parameters[i] = old[i] - step
