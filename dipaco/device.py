"""The device a volunteer names, checked before anything depends on it, and how it is used."""

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


def require_compiler(device: torch.device) -> None:
    """ConfigError unless `torch.compile` works on the device. Takes some seconds.

    It needs what a machine may lack: a C++ compiler, Python's headers, on a GPU Triton.
    """
    x = torch.ones(16, device=device, requires_grad=True)
    try:
        torch.compile(torch.sin)(x).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ConfigError(
            f"torch.compile does not work on {device}: {str(error).splitlines()[0]}",
            hint="install a C++ compiler (g++) and Python's headers, or go without --compile",
        ) from error


def free_memory_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def autocast(device: torch.device) -> torch.autocast:
    """The context in which a network runs: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
