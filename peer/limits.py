"""What a volunteer's path needs of its disk and memory, and what that leaves for others' sake.

All figures are bytes, and rough on purpose: they decide before anything is downloaded whether a
machine can take part, and how much it keeps for the swarm besides its own path.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dht.errors import LocalFault
from dipaco.checkpoint import state_bytes
from dipaco.compression import encoded_bytes
from dipaco.config import RunConfig
from dipaco.footprint import least_training_bytes
from dipaco.model import num_parameters
from dipaco.topology import Topology
from peer.config import PeerConfig
from peer.contributions import SLOTS_KEPT
from peer.events import MAX_LOG_BYTES
from peer.manifest import Manifest
from peer.messages import MAX_COUNTED
from peer.modules import MAX_RECENT_BYTES, STATES_KEPT
from peer.path_files import PATHS_KEPT
from peer.reduction import merged_format

T = TypeVar("T")

# Of a path: its first version, those kept, the next one, and its copy while that is written. The
# rest is for the path before, which is held until others hold it.
STATES_ON_DISK = 8
# Of a path that was trained: AdamW's two moments, the residual of the compression, and it at its
# best. Of the one that is trained also room to replace the first of them.
KEPT_BYTES_PER_PARAMETER = 16
WORK_BYTES_PER_PARAMETER = KEPT_BYTES_PER_PARAMETER + 8
# Python, torch, hivemind and p2pd, before any path is taken.
PROCESS_BYTES = 10**9
# In main memory, wherever training runs: where progress is counted from (4), the contribution under
# way (8), the residual (4), a state and its successor while it is reduced (16).
ROUND_BYTES_PER_PARAMETER = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a volunteer allows, divided; None is no limit."""

    blob_bytes: int | None  # on disk, for everything in the blob store
    duty_bytes: int | None  # of these, for what is kept for others
    paths_kept: int  # of so many, the present one included, the optimizer's state stays on disk
    training_bytes: int | None  # in memory, for training on the CPU
    recent_bytes: int  # in memory, for states that are needed again soon


def divide(config: PeerConfig, manifest: Manifest, *, run_dir: Path, trains_on_cpu: bool) -> Limits:
    """Divide what `config` allows; raises `LocalFault` if a path of this run does not fit.

    `run_dir` is where the state of the run lies.
    """
    parameters = path_parameters(manifest.run_config, manifest.topology)
    blob_bytes = duty_bytes = training_bytes = None
    recent_bytes, paths_kept = MAX_RECENT_BYTES, PATHS_KEPT
    check_free_disk(manifest, run_dir)
    if config.disk_limit_bytes is not None:
        needed = disk_bytes(manifest)
        if config.disk_limit_bytes < needed:
            raise LocalFault(
                f"this run needs {gigabytes(needed)} of disk, "
                f"`--disk-limit` allows {gigabytes(config.disk_limit_bytes)}",
                hint=f"allow more: `--disk-limit {_round_up(needed)}`",
            )
        spare = config.disk_limit_bytes - needed
        kept_bytes = parameters * KEPT_BYTES_PER_PARAMETER
        paths_kept = 1 + min(PATHS_KEPT - 1, spare // 2 // kept_bytes)
        duty_bytes = spare - (paths_kept - 1) * kept_bytes
        blob_bytes = duty_bytes + needed - _other_files_bytes(parameters)
    if config.memory_limit_bytes is not None:
        needed = PROCESS_BYTES + parameters * ROUND_BYTES_PER_PARAMETER + state_bytes(parameters)
        training_bytes = config.memory_limit_bytes - needed
        if trains_on_cpu:
            needed += least_training_bytes(manifest.run_config, parameters)
        if config.memory_limit_bytes < needed:
            raise LocalFault(
                f"a path of this run needs {gigabytes(needed)} of memory, "
                f"`--memory-limit` allows {gigabytes(config.memory_limit_bytes)}",
                hint=f"allow more: `--memory-limit {_round_up(needed)}`",
            )
        spare = config.memory_limit_bytes - needed
        recent_bytes = min(MAX_RECENT_BYTES, state_bytes(parameters) + spare // 2)
    return Limits(
        blob_bytes=blob_bytes,
        duty_bytes=duty_bytes,
        paths_kept=paths_kept,
        training_bytes=training_bytes if trains_on_cpu else None,
        recent_bytes=recent_bytes,
    )


def path_parameters(run: RunConfig, topology: Topology) -> int:
    """Number of parameters of one path: what a peer holds while it trains."""
    modules = topology.modules_of(topology.path_at(0))
    return sum(num_parameters(run.model, topology, module) for module in modules)


def disk_bytes(manifest: Manifest) -> int:
    """What training a path of this run needs on disk, with nothing kept for others."""
    parameters = path_parameters(manifest.run_config, manifest.topology)
    shard_bytes = max(shard.blob.num_bytes for shard in manifest.shards)
    blobs = STATES_ON_DISK * state_bytes(parameters) + 2 * shard_bytes
    blobs += contribution_bytes(manifest.run_config, parameters)
    return blobs + _other_files_bytes(parameters)


def check_free_disk(manifest: Manifest, run_dir: Path) -> None:
    """Raise `LocalFault` if the disk cannot hold what a volunteer needs.

    What the run has there from before is part of it: who took part has filled its disk with it.
    """
    needed, free, used = disk_bytes(manifest), shutil.disk_usage(run_dir).free, _used_bytes(run_dir)
    if free + used < needed:
        raise LocalFault(
            f"the disk of `{run_dir}` has {gigabytes(free)} free, "
            f"this run needs {gigabytes(needed)} and has {gigabytes(used)} of that",
            hint="free some space, or choose another disk with `--state-dir DIR`",
        )


def contribution_bytes(run: RunConfig, num_parameters: int) -> int:
    """What contributions take on disk: of the slots kept and the one under way, full rounds.

    However few peers there are now: a volunteer is to have room for those who are still to come.
    """
    wire_format = merged_format(run.outer.wire_format)  # as large as any, in crowded rounds
    return (SLOTS_KEPT + 1) * MAX_COUNTED * encoded_bytes(wire_format, num_parameters)


def duty_module_bytes(run: RunConfig, num_parameters: int) -> int:
    """What it takes on disk to keep a module for others: versions, the next one, contributions."""
    states = (STATES_KEPT + 1) * state_bytes(num_parameters)
    return states + contribution_bytes(run, num_parameters)


def affordable(wanted: Iterable[tuple[T, int]], room_bytes: int | None) -> list[T]:
    """Of (what, its bytes), those that fit into the room together, taken in the order given."""
    taken = []
    for what, num_bytes in wanted:
        if room_bytes is not None:
            if num_bytes > room_bytes:
                continue
            room_bytes -= num_bytes
        taken.append(what)
    return taken


def gigabytes(num_bytes: int) -> str:
    """For a person, in the units that the options are given in."""
    return f"{num_bytes / 1e9:.2f} GB"


def _used_bytes(directory: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in directory.rglob("*"))  # some have holes


def _other_files_bytes(parameters: int) -> int:
    """What lies beside the blobs: the optimizer's state, and the event log with its predecessor."""
    return parameters * WORK_BYTES_PER_PARAMETER + 2 * MAX_LOG_BYTES


def _round_up(num_bytes: int) -> str:
    return f"{num_bytes / 1e9 + 0.1:.1f}GB"
