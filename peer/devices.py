"""Which device trains, which optimizer fits it, and why, in words for the volunteer."""

from dataclasses import dataclass

import torch

from dipaco.config import RunConfig
from dipaco.device import find_device, free_memory_bytes, require_compiler
from dipaco.footprint import choose_optimizer
from dipaco.inner import PathTrainer
from dipaco.optimizer import OptimizerName
from dipaco.shards import Shard
from dipaco.topology import PathID, Topology
from peer.config import PeerConfig
from peer.limits import path_parameters
from peer.manifest import Manifest
from peer.path_source import TrainerFactory


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceChoice:
    """Where training runs, and how."""

    device: torch.device
    optimizer: OptimizerName
    compiled: bool
    description: str  # one line: the device, the optimizer, and why


def choose_device(config: PeerConfig, run: RunConfig, topology: Topology) -> DeviceChoice:
    """Pick the device; raises `ConfigError` for one that this machine does not have.

    Takes some seconds where it is to compile, which is tried.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = find_device(name)
    if config.compiled:
        require_compiler(device)
    parameters = path_parameters(run, topology)
    choice = choose_optimizer(run, parameters, free_memory_bytes(device))
    optimizer: OptimizerName = choice.name if config.optimizer == "auto" else config.optimizer
    reason = choice.reason if config.optimizer == "auto" else "as asked for"
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{config.threads} threads"
    )
    return DeviceChoice(
        device=device,
        optimizer=optimizer,
        compiled=config.compiled,
        description=f"{device} ({machine}{', compiled' * config.compiled}), "
        f"optimizer {optimizer}: {reason}",
    )


def trainer_factory(choice: DeviceChoice) -> TrainerFactory:
    """A `path_source.TrainerFactory` for this device."""

    def make(manifest: Manifest, path: PathID, shard: Shard) -> PathTrainer:
        return PathTrainer(
            manifest.run_config,
            manifest.topology,
            path,
            shard,
            device=choice.device,
            optimizer=choice.optimizer,
            compiled=choice.compiled,
        )

    return make
