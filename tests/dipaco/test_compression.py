import subprocess
import sys

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_blockwise
from hypothesis import given
from hypothesis import strategies as st

from dipaco.blocks import Int4Codec, Int8Codec, dynamic_table, four_bit_table
from dipaco.checkpoint import ModuleState
from dipaco.codec import PART_VALUES
from dipaco.compression import (
    EncodedGradient,
    WireFormat,
    compress_with_feedback,
    decode,
    encode,
    encoded_bytes,
)
from dipaco.config import OuterConfig
from dipaco.errors import BadContribution
from dipaco.outer import apply_contributions
from dipaco.tensors import decode_tensors, encode_tensors, layout_of

FORMATS: list[WireFormat] = ["float32", "float16", "int8", "int4", "topk"]
BLOCK_VALUES = {"int8": Int8Codec.block_values, "int4": Int4Codec.block_values}
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


@pytest.mark.parametrize("wire_format", ["float32", "float16", "int8", "int4"])
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


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("size", [1, 63, 127, 128, 5001, 2**16, 2**17 + 1])
def test_adding_up_and_measuring_agree_with_the_values(wire_format: WireFormat, size: int) -> None:
    """What a format does without its single values, against these."""
    vector = a_vector(size, seed=size)
    raw = encode(vector, wire_format)
    decoded = decode(raw, wire_format, num_parameters=size).numpy()
    gradient = EncodedGradient(raw, wire_format, num_parameters=size)
    assert gradient.norm == pytest.approx(float(np.linalg.norm(decoded.astype(np.float64))))
    total, scratch = (np.full(PART_VALUES, 0.5, np.float32) for _ in range(2))
    factor = np.float32(0.3)
    for start in range(0, size, PART_VALUES):
        values = decoded[start : start + PART_VALUES]
        expected = total[: len(values)] + values * factor
        gradient.add_part(start, start + len(values), factor, total, scratch)
        assert (total[: len(values)] == expected).all()


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
    raw = encode(torch.ones(4), wire_format)
    tensors = decode_tensors(raw, layout_of(raw))
    tensors[{"int8": "scales", "int4": "scales", "topk": "magnitudes"}.get(wire_format, "values")][
        ...
    ] = float("nan")
    with pytest.raises(BadContribution, match="not finite"):
        decode(encode_tensors(tensors), wire_format, num_parameters=4)


@pytest.mark.parametrize("size", [1, 64, 4095, 4096, 4097, 2**16 + 5])
def test_top_k_keeps_the_largest_of_each_chunk(size: int) -> None:
    vector = a_vector(size) + 1e-30
    raw = encode(vector, "topk")
    assert len(raw) == encoded_bytes("topk", size)
    decoded = decode(raw, "topk", num_parameters=size)
    for chunk, kept in zip(vector.split(4096), decoded.split(4096), strict=True):
        largest = chunk.abs().topk(min(64, len(chunk))).indices
        places = kept.nonzero().flatten()
        assert set(places.tolist()) == set(largest.tolist())
        assert torch.equal(kept[places].sign(), chunk[places].sign())
        assert len(set(kept[places].abs().tolist())) <= 2  # one bit of magnitude
        assert float(kept.abs().sum()) == pytest.approx(float(chunk[places].abs().sum()), rel=0.02)


def test_top_k_refuses_places_that_no_sender_would_write() -> None:
    raw = encode(a_vector(5000), "topk")
    for row, column, place in ((0, 63, 4096), (0, 1, 0), (1, 0, 4000)):
        tensors = decode_tensors(raw, layout_of(raw))
        tensors["places"][row, column] = place
        with pytest.raises(BadContribution, match="places"):
            decode(encode_tensors(tensors), "topk", num_parameters=5000)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_two_peers_average_to_nearly_the_true_mean(wire_format: WireFormat) -> None:
    """In every round, what two residuals still hold is all that the mean lacks."""
    state = ModuleState.initial(torch.zeros(5000))
    config = OuterConfig(learning_rate=1.0, momentum=0.0, rescale="none", wire_format=wire_format)
    true_mean = torch.zeros(5000)
    residuals: list[torch.Tensor | None] = [None, None]
    for round_ in range(4):
        encoded = []
        for peer in (0, 1):
            gradient = a_vector(5000, seed=2 * round_ + peer)
            true_mean += gradient / 2
            raw, residuals[peer] = compress_with_feedback(gradient, residuals[peer], wire_format)
            encoded.append((0.5, EncodedGradient(raw, wire_format, num_parameters=5000)))
        state = apply_contributions(state, encoded, 2, config).state
        missing = sum((0.5 * r for r in residuals if r is not None), torch.zeros(5000))
        assert torch.allclose(missing - state.parameters, true_mean, rtol=1e-4, atol=1e-5)


def test_encoding_waits_for_another_thread_that_still_imports_the_kernels() -> None:
    program = """
import sys, threading, torch
from dipaco.compression import encode
from dipaco.imports import bitsandbytes
threading.Thread(target=bitsandbytes).start()
while "bitsandbytes.functional" not in sys.modules:
    pass
while getattr(sys.modules["bitsandbytes.functional"].__spec__, "_initializing", False):
    pass
encode(torch.ones(8), "int8")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "it speaks of kernels that nobody here needs"
