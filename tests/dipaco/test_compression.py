import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_blockwise
from hypothesis import given
from hypothesis import strategies as st

from dipaco.compression import (
    BLOCK_VALUES,
    WireFormat,
    compress_with_feedback,
    decode,
    dynamic_table,
    encode,
    encoded_bytes,
    four_bit_table,
)
from dipaco.errors import BadContribution
from dipaco.tensors import decode_tensors, encode_tensors, layout_of

FORMATS: list[WireFormat] = ["float32", "float16", "int8", "int4"]
# The largest error, as a share of the largest magnitude in a block: half of the widest gap in the
# table, or all of it where nothing stands for -1; and for 4 bits, what rounds the scale and values.
MAX_ERROR = {"int8": 0.04, "int4": 0.135}
SIZES = [1, 63, 64, 65, 255, 256, 257, 5000, 2**17 + 1]


def a_vector(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.logspace(-8, 2, size)


def scale_of(vector: torch.Tensor, wire_format: WireFormat) -> torch.Tensor:
    """The largest magnitude in the block of each value."""
    block_values = BLOCK_VALUES[wire_format]
    largest = [block.abs().max() for block in torch.split(vector, block_values)]
    return torch.tensor(largest).repeat_interleave(block_values)[: len(vector)]


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_exact_and_errors_are_small(wire_format: WireFormat, size: int) -> None:
    vector = a_vector(size)
    raw = encode(vector, wire_format)
    assert len(raw) == encoded_bytes(wire_format, size)
    decoded = decode(raw, wire_format, num_parameters=size)
    if wire_format in BLOCK_VALUES:
        scale = scale_of(vector, wire_format)
        assert ((decoded - vector).abs() / scale).max() <= MAX_ERROR[wire_format]
    else:
        assert torch.equal(decoded, vector.to(getattr(torch, wire_format)).float())


def test_the_table_is_the_dynamic_one_of_bitsandbytes() -> None:
    assert torch.allclose(dynamic_table(), create_dynamic_map(), rtol=1e-6, atol=0)
    assert torch.equal(dynamic_table(), dynamic_table().sort().values)


@pytest.mark.parametrize("size", SIZES)
def test_decoding_gives_the_bits_of_the_kernels(size: int) -> None:
    raw = encode(a_vector(size), "int8")
    tensors = decode_tensors(raw, layout_of(raw))
    state = QuantState(
        tensors["scales"], code=dynamic_table(), blocksize=BLOCK_VALUES["int8"], dtype=torch.float32
    )
    expected = dequantize_blockwise(tensors["values"], state)
    assert torch.equal(decode(raw, "int8", num_parameters=size), expected)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.integers(-126, 120),
)
def test_four_bits_take_any_finite_values(values: list[float], exponent: int) -> None:
    """Denormal ones, the largest ones, zeros, and blocks of both or of one scale alone."""
    some = torch.tensor(values)
    alike = torch.linspace(-1, 1, len(values)) * 2.0**exponent
    for vector in (some, alike):
        raw = encode(vector, "int4")
        assert raw == encode(vector, "int4")
        decoded = decode(raw, "int4", num_parameters=len(vector))
        allowed = scale_of(vector, "int4").double() * MAX_ERROR["int4"] + 2.0**-100
        assert ((decoded.double() - vector.double()).abs() <= allowed).all()


def test_four_bits_stand_for_the_same_values_everywhere() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.tensor([1.0, -0.3125, 2.0**100, 0.0, 1e-30, -7.0, 3.0, 1.0]).bfloat16()
    decoded = decode(
        encode_tensors({"values": codes, "scales": scales}), "int4", num_parameters=512
    )
    table = [x / 256 for x in (-224, -179, -142, -110, -80, -53, -26, 0)]
    table += [x / 256 for x in (25, 50, 77, 104, 133, 166, 205, 256)]
    pairs = [value for byte in range(256) for value in (table[byte % 16], table[byte // 16])]
    expected = torch.tensor(pairs) * scales.float().repeat_interleave(64)
    assert torch.equal(decoded, expected)


def test_four_bits_lose_little_of_values_with_heavy_tails() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(2**16, generator=generator) * torch.randn(2**16, generator=generator)
    decoded = decode(encode(vector, "int4"), "int4", num_parameters=2**16)
    assert (decoded - vector).norm() / vector.norm() < 0.12
    assert encoded_bytes("int4", 2**16) / 2**16 < 0.54
    assert torch.equal(four_bit_table(), four_bit_table().sort().values)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_what_one_round_loses_the_next_ones_bring(wire_format: WireFormat) -> None:
    sent = torch.zeros(1000, dtype=torch.float64)
    meant = torch.zeros(1000, dtype=torch.float64)
    residual = None
    for seed in range(20):
        gradient = a_vector(1000, seed)
        raw, residual = compress_with_feedback(gradient, residual, wire_format)
        sent += decode(raw, wire_format, num_parameters=1000)
        meant += gradient
    left = torch.zeros(1000) if residual is None else residual
    assert torch.allclose(sent + left, meant, rtol=1e-4, atol=1e-5)
    assert (residual is None) == (wire_format == "float32")


@given(st.binary(max_size=300), st.sampled_from(FORMATS), st.integers(0, 200))
def test_garbage_is_a_bad_contribution(
    garbage: bytes, wire_format: WireFormat, length: int
) -> None:
    raw = encode(a_vector(20), wire_format)
    for wrong in (garbage, raw[: min(length, len(raw) - 1)], raw + b"\0"):
        with pytest.raises(BadContribution):
            decode(wrong, wire_format, num_parameters=20)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_values_that_are_not_finite_are_refused_on_both_sides(wire_format: WireFormat) -> None:
    with pytest.raises(BadContribution, match="not finite"):
        encode(torch.tensor([1.0, float("nan")]), wire_format)
    raw = bytearray(encode(torch.ones(4), wire_format))
    # The last value, or the last scale: values are bytes, and lie behind the scales.
    end = len(raw) - {"int8": 4, "int4": 2}.get(wire_format, 0)
    nan = {"float16": b"\x00\x7e", "int4": b"\xc0\x7f"}.get(wire_format, b"\x00\x00\xc0\x7f")
    raw[end - len(nan) : end] = nan
    with pytest.raises(BadContribution, match="not finite"):
        decode(bytes(raw), wire_format, num_parameters=4)


def test_encoding_waits_for_another_thread_that_still_imports_the_kernels() -> None:
    program = """
import sys, threading, torch
from dipaco.compression import encode
threading.Thread(target=lambda: __import__("bitsandbytes")).start()
while "bitsandbytes.functional" not in sys.modules:
    pass
while getattr(sys.modules["bitsandbytes.functional"].__spec__, "_initializing", False):
    pass
encode(torch.ones(8), "int8")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
