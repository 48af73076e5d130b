"""What each round of a training on one machine leaves on disk: whole, or not there at all.

    round-000012/  modules/  optimizers/  residuals/  early-stopped/  reports.json

A round is written next to the one before, which it replaces only when it is complete. So an
interrupted training continues at the round it was in, bit for bit. Files that a round does not
change are links to those of the round before, or copies where there are no links. The disk is
waited for once, at a round's end: until then it may write while the paths train.
"""

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipaco.checkpoint import (
    ModuleState,
    decode_state,
    flush_to_disk,
    link_or_copy,
    tensors_of,
    write_atomically,
    write_tensors,
)
from dipaco.compression import encoded_bytes
from dipaco.config import RunConfig
from dipaco.errors import BadBytes
from dipaco.evaluate import Evaluation
from dipaco.model import num_parameters
from dipaco.tensors import decode_tensors
from dipaco.topology import ModuleID, PathID, Topology

Evaluations = dict[PathID, Evaluation]
"""Each path, scored on the validation part of its own shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """What there is to say of a round; `round` 0 is the start, before any training.

    Mean training loss (nats per token) of the paths that trained, the last evaluation of every
    path, and for each module that took a step the ratio that `dipaco.outer.OuterUpdate` explains.
    """

    round: int
    losses: dict[PathID, float]
    evaluations: Evaluations
    norm_ratios: dict[ModuleID, float]


class RoundFiles:
    """The files of one round."""

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self.directory = directory
        self._config = config
        self._topology = Topology.of(config)

    @property
    def number(self) -> int:
        """How many rounds were trained."""
        return int(self.directory.name.removesuffix(_PARTIAL).removeprefix(_ROUND))

    def state(self, module: ModuleID) -> ModuleState:
        """A module after this round; BadBytes if it is damaged."""
        size = num_parameters(self._config.model, self._topology, module)
        try:
            return decode_state(self._module_file(module).read_bytes(), num_parameters=size)
        except FileNotFoundError as error:
            raise BadBytes(f"{self.directory} has no module {module}", hint=DAMAGED_HINT) from error

    def write_state(self, module: ModuleID, state: ModuleState) -> None:
        """Keep a module."""
        write_tensors(self._module_file(module), tensors_of(state), flush=False)

    def optimizer_file(self, path: PathID, replica: int) -> Path:
        """The optimizer's state of one replica of a path; it may not be there."""
        return self.directory / "optimizers" / f"{path}-{replica}.safetensors"

    def num_replicas(self) -> int:
        """How many replicas each path that was trained has; 0 if none was."""
        files = (self.directory / "optimizers").iterdir()
        return len({file.stem.rpartition("-")[2] for file in files})

    def residuals(self, path: PathID, replica: int) -> dict[ModuleID, Tensor]:
        """What a replica's outer gradients lost in compression so far, by module."""
        sizes = {
            module: num_parameters(self._config.model, self._topology, module)
            for module in self._topology.modules_of(path)
        }
        layout = {str(module): (torch.float32, (size,)) for module, size in sizes.items()}
        try:
            tensors = decode_tensors(self._residual_file(path, replica).read_bytes(), layout)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise BadBytes(f"residuals of path {path} are damaged", hint=DAMAGED_HINT) from error
        return {ModuleID.parse(name): residual for name, residual in tensors.items()}

    def write_residuals(
        self, path: PathID, replica: int, residuals: dict[ModuleID, Tensor]
    ) -> None:
        """Keep the residuals of a replica; nothing is written if there are none."""
        if residuals:
            tensors = {str(module): residual for module, residual in residuals.items()}
            write_tensors(self._residual_file(path, replica), tensors, flush=False)

    def early_stopped_file(self, path: PathID) -> Path:
        """A path as it did best so far (`dipaco.early_stopping`); it may not be there."""
        return self.directory / "early-stopped" / f"{path}.safetensors"

    def put_aside(self, module: ModuleID, raw: bytes) -> None:
        """Keep an encoded outer gradient on disk until the round is complete."""
        with self._aside_file(module).open("ab") as stream:
            stream.write(raw)
            stream.write(bytes(-len(raw) % _ALIGNMENT_BYTES))

    def put_aside_of(self, module: ModuleID) -> list[memoryview]:
        """All that was put aside of a module, in that order.

        Mapped, as one file: however many there are, they take no memory and one descriptor.
        """
        try:
            mapped = np.memmap(self._aside_file(module), dtype=np.uint8, mode="r").data
        except FileNotFoundError:
            return []
        size = num_parameters(self._config.model, self._topology, module)
        num_bytes = encoded_bytes(self._config.outer.wire_format, size)
        stride = num_bytes + -num_bytes % _ALIGNMENT_BYTES
        return [mapped[start : start + num_bytes] for start in range(0, len(mapped), stride)]

    def reports(self) -> list[RoundReport]:
        """What was reported of every round so far."""
        try:
            return [_report_of(entry) for entry in json.loads(self._report_file.read_text())]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadBytes(f"{self._report_file} is damaged", hint=DAMAGED_HINT) from error

    def write_reports(self, reports: list[RoundReport]) -> None:
        """Keep the reports."""
        text = json.dumps([_plain(report) for report in reports], indent=1)
        write_atomically(self._report_file, (text + "\n").encode(), flush=False)

    @property
    def _report_file(self) -> Path:
        return self.directory / "reports.json"

    def _module_file(self, module: ModuleID) -> Path:
        return self.directory / "modules" / f"{module}.safetensors"

    def _aside_file(self, module: ModuleID) -> Path:
        return self.directory / _ASIDE / str(module)

    def _residual_file(self, path: PathID, replica: int) -> Path:
        return self.directory / "residuals" / f"{path}-{replica}.safetensors"


_ROUND = "round-"
_PARTIAL = ".partial"
_ASIDE = "contributions"  # of a round that is not complete
_ALIGNMENT_BYTES = 64  # a cache line
_FOLDERS = ("modules", "optimizers", "residuals", "early-stopped")
_MAX_TRIES = 100  # to hold a round before it is deleted; each time there is a later one
DAMAGED_HINT = "delete that folder to train from the start"


def latest_round(directory: Path, config: RunConfig) -> RoundFiles | None:
    """The last complete round in a training's directory; None if there is none."""
    rounds = _complete_rounds(directory)
    return RoundFiles(rounds[-1], config) if rounds else None


def hold_latest_round(directory: Path, config: RunConfig) -> RoundFiles | None:
    """`latest_round`, which a training leaves there for as long as the result is in use.

    Held by a lock of the kernel, so that it is let go of, too, if this process is killed.
    """
    files = None
    for _ in range(_MAX_TRIES):
        files = latest_round(directory, config)
        if files is None:
            break
        descriptor = _lock(files.directory, fcntl.LOCK_SH)
        if descriptor is None:
            continue
        weakref.finalize(files, os.close, descriptor)
        if files.directory.is_dir():  # else it was deleted just before
            break
    return files


def delete_older_rounds(directory: Path) -> None:
    """All but the latest, which a training that was killed left, or somebody used until now."""
    for folder in _complete_rounds(directory)[:-1]:
        descriptor = _lock(folder, fcntl.LOCK_EX)
        if descriptor is not None:
            try:
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _complete_rounds(directory: Path) -> list[Path]:
    return sorted(
        folder for folder in directory.glob(f"{_ROUND}*") if not folder.name.endswith(_PARTIAL)
    )


def _lock(folder: Path, operation: int) -> int | None:
    """A descriptor that holds the lock of a folder; None if it is held otherwise, or gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # no folder can be locked on this file system (NFS): whoever uses one may lose it
    return descriptor


@contextmanager
def next_round(directory: Path, config: RunConfig) -> Iterator[RoundFiles]:
    """The round after the latest, or round 0: becomes the latest when the context ends well.

    Begins as a copy of the latest round, which is deleted afterwards, unless it is held.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"*{_PARTIAL}"):
        shutil.rmtree(leftover)
    before = latest_round(directory, config)
    number = 0 if before is None else before.number + 1
    partial = directory / f"{_ROUND}{number:06}{_PARTIAL}"
    if before is None:
        partial.mkdir()
    else:
        shutil.copytree(before.directory, partial, copy_function=link_or_copy)
    for folder in (*_FOLDERS, _ASIDE):
        (partial / folder).mkdir(exist_ok=True)
    yield RoundFiles(partial, config)
    shutil.rmtree(partial / _ASIDE)
    for path in (*partial.rglob("*"), partial):
        flush_to_disk(path)
    partial.rename(partial.with_name(partial.name.removesuffix(_PARTIAL)))
    flush_to_disk(directory)
    delete_older_rounds(directory)


def _plain(report: RoundReport) -> dict[str, object]:
    return {
        "round": report.round,
        "losses": {str(path): loss for path, loss in report.losses.items()},
        "evaluations": {
            str(path): [evaluation.nll_sum, evaluation.num_tokens]
            for path, evaluation in report.evaluations.items()
        },
        "norm_ratios": {str(module): ratio for module, ratio in report.norm_ratios.items()},
    }


def _report_of(entry: dict[str, Any]) -> RoundReport:
    return RoundReport(
        round=int(entry["round"]),
        losses={PathID.parse(path): float(v) for path, v in entry["losses"].items()},
        evaluations={
            PathID.parse(path): Evaluation(nll_sum=nll_sum, num_tokens=int(num_tokens))
            for path, (nll_sum, num_tokens) in entry["evaluations"].items()
        },
        norm_ratios={ModuleID.parse(m): float(v) for m, v in entry["norm_ratios"].items()},
    )
