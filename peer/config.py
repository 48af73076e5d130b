"""What a volunteer may choose. Nothing here changes what the swarm computes (promise P9)."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import platformdirs

DeviceName = str  # "auto", "cpu", "cuda" or "cuda:N"
OptimizerChoiceName = Literal["auto", "adamw", "adamw8bit"]


def default_state_dir() -> Path:
    """Where a volunteer's identity and blobs live unless told otherwise."""
    return Path(platformdirs.user_state_dir("dipaco"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """One machine's own settings."""

    state_dir: Path = field(default_factory=default_state_dir)
    initial_peers: tuple[str, ...] = ()
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    client_mode: bool = False  # listen nowhere
    relay_service: bool = False  # relay for those who cannot be dialled
    device: DeviceName = "auto"
    optimizer: OptimizerChoiceName = "auto"
    compiled: bool = False  # train through `torch.compile`
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    max_mbps: float = math.inf  # Mbit/s, in either direction
    disk_limit_bytes: int | None = None  # for the whole state directory; None is what the disk has
    memory_limit_bytes: int | None = None  # of this process; None is what the machine has

    @property
    def max_bytes_per_second(self) -> float:
        """The ceiling on what is sent, and on what is received."""
        return self.max_mbps * 1e6 / 8

    @property
    def relays(self) -> bool:
        """Whether it relays for others; never under a ceiling, which would not hold for that."""
        return self.relay_service and math.isinf(self.max_mbps)
