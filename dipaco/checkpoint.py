"""The state of a module, as bytes and on disk.

A state is what every holder of a module at one version has in common, bit for bit: parameters
and outer momentum, float32, each one flat vector in the canonical order of `model`.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dipaco.digest import blob_digest
from dipaco.errors import BadState
from dipaco.recycled import recycled
from dipaco.tensors import (
    Layout,
    encode_header,
    encode_tensors,
    encoded_bytes,
    encoded_pieces,
    is_finite,
    split_tensors,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleState:
    """Parameters and outer momentum of a module: 1-D, float32, on the CPU, of equal length."""

    parameters: Tensor
    momentum: Tensor

    def __post_init__(self) -> None:
        for vector in (self.parameters, self.momentum):
            if vector.dim() != 1 or vector.dtype != torch.float32 or vector.device.type != "cpu":
                raise ValueError("a module state is made of 1-D float32 vectors on the CPU")
        if self.parameters.shape != self.momentum.shape:
            raise ValueError("parameters and momentum differ in length")

    @classmethod
    def initial(cls, parameters: Tensor) -> "ModuleState":
        """The state at version 0: these parameters, no momentum."""
        return cls(parameters=parameters, momentum=torch.zeros_like(parameters))

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return self.parameters.numel()


def encode_state(state: ModuleState) -> bytes:
    """The state as safetensors: the same state gives the same bytes on every machine."""
    return encode_tensors(tensors_of(state))


def tensors_of(state: ModuleState) -> dict[str, Tensor]:
    """The tensors of an encoded state, by their names in it."""
    return {"parameters": state.parameters, "momentum": state.momentum}


def blank_state(num_parameters: int) -> tuple[memoryview, ModuleState]:
    """An encoded state to be filled in: what is written into the vectors is in the bytes too.

    So a new version is computed right where it is hashed and written from. The values are
    arbitrary until then.
    """
    layout = _layout(num_parameters)
    raw = recycled(encoded_bytes(layout))
    header = encode_header(layout)
    raw[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    bodies = split_tensors(raw.data, layout)
    vectors = {
        name: torch.from_numpy(np.asarray(body).view(np.float32)) for name, body in bodies.items()
    }
    state = ModuleState(parameters=vectors["parameters"], momentum=vectors["momentum"])
    return raw.data, state


def state_bytes(num_parameters: int) -> int:
    """Exact length of an encoded state."""
    return encoded_bytes(_layout(num_parameters))


def decode_state(raw: bytes | memoryview, *, num_parameters: int) -> ModuleState:
    """The inverse of `encode_state`; BadState on anything odd: size, layout, not finite."""
    try:
        split_tensors(raw, _layout(num_parameters))
    except ValueError as error:
        raise BadState(f"not a module state: {error}") from error
    encoded, state = blank_state(num_parameters)
    encoded[:] = raw
    if not (is_finite(state.parameters) and is_finite(state.momentum)):
        raise BadState("not a module state: a value is not finite")
    return state


def state_digest(state: ModuleState) -> str:
    """Name of the encoded state as a blob: what a certificate says."""
    return blob_digest(encode_state(state))


_PARTIAL = ".partial"


@contextmanager
def replacing(file: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """A stream for the new content of a file. A crash at any instant, or an error inside the
    block, leaves the old file; the end of the block leaves the new one, whole.

    Without `flush`, which waits for the disk, that holds for crashes of this process, and for those
    of the machine after a later `flush_to_disk`.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}{_PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if flush:
                os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:  # the rename itself is durable only once the directory is
        flush_to_disk(file.parent)


def sweep(*folders: Path) -> None:
    """Delete what killed processes left of files that they were `replacing`.

    For who is alone in these folders: it takes from others what they are writing.
    """
    for folder in folders:
        for leftover in folder.glob(f".*{_PARTIAL}"):
            leftover.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until what is in a file, or which files are in a directory, survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Another name for a file that is replaced but never written into, as all here are.

    A copy on a file system without hard links (exFAT, SMB), or on another one.
    """
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_atomically(file: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
    """Write a file so that a crash at any instant leaves the old one or the new one, whole."""
    with replacing(file, flush=flush) as stream:
        stream.write(data)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, flush: bool = True) -> None:
    """`write_atomically` of tensors of the CPU as safetensors, without a copy of them in memory."""
    with replacing(file, flush=flush) as stream:
        for piece in encoded_pieces(tensors):
            stream.write(piece)


def _layout(num_parameters: int) -> Layout:
    vector = (torch.float32, (num_parameters,))
    return {"parameters": vector, "momentum": vector}
