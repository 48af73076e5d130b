"""The device a volunteer names, checked before anything depends on it."""

import torch

from dipaco.errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device of that name: "cpu", "cuda", "cuda:1"; ConfigError if there is none here."""
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    wanted = f"{name}:0" if name == "cuda" else name
    if wanted not in available:
        raise ConfigError(
            f"no device {name!r} on this machine", hint=f"available: {', '.join(available)}"
        )
    return torch.device(wanted)


def free_memory_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
