from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipaco.checkpoint import (
    ModuleState,
    decode_state,
    encode_state,
    state_bytes,
    state_digest,
    write_atomically,
)
from dipaco.errors import BadState
from dipaco.tensors import decode_tensors, encode_tensors, layout_of


def a_state(size: int = 37) -> ModuleState:
    generator = torch.Generator().manual_seed(0)
    return ModuleState(
        parameters=torch.randn(size, generator=generator),
        momentum=torch.randn(size, generator=generator),
    )


def test_a_state_round_trips_in_the_bytes_that_safetensors_writes() -> None:
    state = a_state()
    raw = encode_state(state)
    tensors = {"parameters": state.parameters, "momentum": state.momentum}
    assert raw == safetensors.torch.save(tensors)
    assert len(raw) == state_bytes(37)
    decoded = decode_state(raw, num_parameters=37)
    assert torch.equal(decoded.parameters, state.parameters)
    assert torch.equal(decoded.momentum, state.momentum)
    assert encode_state(decoded) == raw


def test_the_bytes_of_a_state_never_change() -> None:
    state = ModuleState(parameters=torch.arange(5.0), momentum=torch.full((5,), -0.0))
    expected = "067c3058658865aa078a46ad59cabb23cc5d969e2f4196677879f677c912ca64"
    assert state_digest(state) == expected


def test_mixed_dtypes_are_laid_out_as_safetensors_does() -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.tensor([[1, 2], [3, 65535]], dtype=torch.uint16),
        "d": torch.tensor(7),
        "c": torch.ones(2, 0),
    }
    raw = encode_tensors(tensors)
    assert raw == safetensors.torch.save(tensors)
    decoded = decode_tensors(raw, layout_of(raw))
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())


@given(st.binary(max_size=400), st.integers(0, 400))
def test_garbage_and_truncation_are_bad_states(garbage: bytes, length: int) -> None:
    raw = encode_state(a_state())
    for wrong in (garbage, raw[: min(length, len(raw) - 1)], raw + b"\0"):
        with pytest.raises(BadState):
            decode_state(wrong, num_parameters=37)
    with pytest.raises(BadState):
        decode_state(raw, num_parameters=36)


@given(st.binary(max_size=200), st.integers(0, 160))
def test_a_claimed_layout_is_checked(garbage: bytes, position: int) -> None:
    raw = encode_state(a_state())
    spoiled = raw[:position] + garbage + raw[position + len(garbage) :]
    for wrong in (garbage, spoiled):
        try:
            assert encode_tensors(decode_tensors(wrong, layout_of(wrong))) == wrong
        except ValueError:
            continue


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    state = a_state()
    state.momentum[3] = value
    with pytest.raises(BadState, match="not finite"):
        decode_state(encode_state(state), num_parameters=37)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state"
    write_atomically(file, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
