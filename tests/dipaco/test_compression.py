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
)
from dipaco.errors import BadContribution
from dipaco.tensors import decode_tensors, layout_of

FORMATS: list[WireFormat] = ["float32", "float16", "int8"]
SIZES = [1, 255, 256, 257, 5000]


def a_vector(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.logspace(-8, 2, size)


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_exact_and_errors_are_small(wire_format: WireFormat, size: int) -> None:
    vector = a_vector(size)
    raw = encode(vector, wire_format)
    assert len(raw) == encoded_bytes(wire_format, size)
    decoded = decode(raw, wire_format, num_parameters=size)
    if wire_format == "int8":
        scale = torch.tensor([block.abs().max() for block in torch.split(vector, BLOCK_VALUES)])
        error = (decoded - vector).abs() / scale.repeat_interleave(BLOCK_VALUES)[:size]
        assert error.max() <= 0.04
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
        tensors["scales"], code=dynamic_table(), blocksize=BLOCK_VALUES, dtype=torch.float32
    )
    expected = dequantize_blockwise(tensors["values"], state)
    assert torch.equal(decode(raw, "int8", num_parameters=size), expected)


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
    scale_or_last = -8 if wire_format == "int8" else -4
    nan = b"\x00\x00\xc0\x7f" if wire_format != "float16" else b"\x00\x7e\x00\x7e"
    raw[scale_or_last : scale_or_last + 4 or None] = nan
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
