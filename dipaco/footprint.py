"""Memory that training takes, estimated before any of it is allocated."""

from dataclasses import dataclass

from dipaco.config import RunConfig
from dipaco.optimizer import OptimizerName

# Logits of training held at a time: few enough for the cache of a CPU core, enough to fill a GPU.
LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**27}

_STATE_BYTES = {"adamw": 8, "adamw8bit": 2}  # per parameter
_WEIGHT_BYTES = 4 + 4  # per parameter: itself and its gradient
_LOGIT_BYTES = 12  # in bfloat16, as log-probabilities, and the gradients that they become


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    """Bytes that a block saves of a token for the backward pass, per unit of each width.

    Counted from the tensors that autograd saved of networks of several shapes.
    """

    width: int
    kv_width: int
    ffn_width: int


_SAVED = {
    "cpu": _Saved(width=32, kv_width=8, ffn_width=16),  # float32
    "cuda": _Saved(width=31, kv_width=4, ffn_width=8),  # bfloat16, with float32 between the halves
}


def training_bytes(
    config: RunConfig, num_parameters: int, device_type: str, optimizer: OptimizerName
) -> int:
    """What a path of that many parameters takes while it trains on a "cpu" or "cuda".

    On an H200, `examples/gpu.toml` takes 5.0 GiB where this says 5.8.
    """
    model, saved = config.model, _SAVED[device_type]
    kv_width = model.num_kv_heads * model.head_width
    per_token = saved.width * model.width + saved.kv_width * kv_width
    per_token += saved.ffn_width * model.ffn_width
    tokens = config.inner.batch_sequences * model.sequence_tokens
    num_logits = min(tokens * model.vocab_size, LOGITS_AT_ONCE[device_type] + model.vocab_size)
    weights = num_parameters * (_WEIGHT_BYTES + _STATE_BYTES[optimizer])
    return weights + tokens * model.num_blocks * per_token + num_logits * _LOGIT_BYTES


def least_training_bytes(config: RunConfig, num_parameters: int) -> int:
    """Memory without which a path of that many parameters is not trained on a CPU."""
    return training_bytes(config, num_parameters, "cpu", "adamw8bit")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerChoice:
    """Which optimizer to use, and why, in words for a person."""

    name: OptimizerName
    reason: str


def choose_optimizer(
    config: RunConfig, num_parameters: int, free_memory_bytes: int | None
) -> OptimizerChoice:
    """AdamW, or its 8-bit form where the memory of a GPU is short.

    `free_memory_bytes` is None on a CPU.
    """
    if free_memory_bytes is None:
        return OptimizerChoice(name="adamw", reason="the CPU trains with 32-bit AdamW")
    needed = {
        name: training_bytes(config, num_parameters, "cuda", name)
        for name in ("adamw", "adamw8bit")
    }
    free = f"{_gib(free_memory_bytes)} free"
    sizes = f"{_gib(needed['adamw'])} needed, {free}"
    if needed["adamw"] <= free_memory_bytes:
        return OptimizerChoice(name="adamw", reason=f"32-bit AdamW fits the GPU: {sizes}")
    reason = f"GPU memory is short for AdamW: {sizes}"
    if needed["adamw8bit"] > free_memory_bytes:
        least = f"{_gib(needed['adamw8bit'])} needed"
        reason = f"GPU memory may be short even for 8-bit AdamW: {least}, {free}"
    return OptimizerChoice(name="adamw8bit", reason=reason)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
