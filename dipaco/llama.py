"""Llama checkpoints, as Hugging Face lays them out: one to start from, a path as one.

Only what a path can be is read: no biases, no scaled rotary positions, at most 65536 tokens.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dipaco.checkpoint import write_atomically
from dipaco.config import MAX_VOCABULARY, ModelConfig
from dipaco.errors import ConfigError
from dipaco.model import HEAD, PathNet
from dipaco.start import TOKENIZER_FILE
from dipaco.tensors import is_finite

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_ARCHITECTURE = "LlamaForCausalLM"
_MAX_SEQUENCE_TOKENS = 65_536
# What config.json must say, where it says anything: a path is nothing else.
_REQUIRED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
# Our word for what changes the shape or the arithmetic of the network, and config.json's.
_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_blocks": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_width": "intermediate_size",
    "head_width": "head_dim",
    "tied_embedding": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def model_section(directory: Path) -> dict[str, Any]:
    """The [model] values of a run that starts from this checkpoint; ConfigError if none can.

    `sequence_tokens` is the most the checkpoint was made for: a run may take less.
    """
    llama = _read_config(directory)
    shape = _shape_of(llama)
    sequence_tokens = min(_integer(llama, "max_position_embeddings", 2048), _MAX_SEQUENCE_TOKENS)
    return {**shape, "sequence_tokens": sequence_tokens, **_end_and_pad(directory, llama)}


def read_llama(directory: Path, config: ModelConfig) -> PathNet:
    """The network of a checkpoint, in float32; ConfigError names what does not fit `config`."""
    for key, value in _shape_of(_read_config(directory)).items():
        if getattr(config, key) != value:
            raise ConfigError(
                f"model.{key} is {json.dumps(getattr(config, key))}, but {_NAMES[key]} of the "
                f"checkpoint in {directory} is {json.dumps(value)}",
                hint=f"set {key} = {json.dumps(value)} in [model]",
            )
    net = PathNet(config)
    parameters = dict(net.named_parameters())
    for name, tensor in _read_tensors(directory):
        if _is_redundant(name, config):
            continue
        if name not in parameters:
            raise ConfigError(
                f"{name} of the checkpoint has no place in the network of this configuration",
                hint="start from another checkpoint",
            )
        _copy(name, tensor, parameters.pop(name))
    if parameters:
        raise ConfigError(
            f"the checkpoint in {directory} has no {min(parameters)}",
            hint="download it again, all files of it",
        )
    return net


def export_llama(net: PathNet, tokenizer_bytes: bytes, directory: Path) -> None:
    """Write a path so that `transformers` loads it: all files, or no directory at all.

    ConfigError if the directory is not empty, or `transformers` would refuse the shape.
    """
    config = net.config
    directory = directory.resolve()
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty", hint="name a directory that does not exist")
    if config.width % config.num_heads:
        raise ConfigError(
            f"model.width is {config.width}, for {config.num_heads} heads",
            hint="transformers accepts only multiples of model.num_heads, whatever the head width",
        )
    text_tokenizer = json.loads(tokenizer_bytes)
    special = _special_tokens(text_tokenizer)
    # What would put a first token before every text, as many Llamas have it: no path has seen one.
    if text_tokenizer.get("post_processor") is not None:
        tokenizer_bytes = _json({**text_tokenizer, "post_processor": None})
    tokens = {"eos_token_id": config.end_token, "pad_token_id": config.pad_token}
    llama = {
        "architectures": [_ARCHITECTURE],
        **_REQUIRED,
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        # Where transformers 5 looks for rope_theta; older ones, and other tools, look above.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.sequence_tokens,
        "bos_token_id": None,
        **tokens,
        "dtype": "float32",
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[config.end_token],
        "pad_token": special[config.pad_token],
        "model_max_length": config.sequence_tokens,
        "clean_up_tokenization_spaces": False,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    files = {
        CONFIG_FILE: _json(llama),
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        TOKENIZER_FILE: tokenizer_bytes,
        TOKENIZER_CONFIG_FILE: _json(tokenizer),
        GENERATION_CONFIG_FILE: _json(tokens),
    }
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name, raw in files.items():
            write_atomically(partial / name, raw)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json; ConfigError unless it is of a network that a path can be."""
    llama = _read_json(directory / CONFIG_FILE)
    architectures = llama.get("architectures")
    if architectures != [_ARCHITECTURE]:
        raise _unfit("architectures", architectures, [_ARCHITECTURE])
    for key, expected in _REQUIRED.items():
        if llama.get(key, expected) != expected:
            raise _unfit(key, llama[key], expected)
    rotary = _rotary(llama)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ("default", "none"):
        place = "rope_parameters" if llama.get("rope_parameters") else "rope_scaling"
        raise _unfit(place, kind, "default")
    return llama


def _rotary(llama: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` of transformers 5, or `rope_scaling` of older ones."""
    settings = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise _unfit("rope_scaling", settings, None)
    return {"rope_theta": llama.get("rope_theta")} | settings


def _shape_of(llama: Mapping[str, Any]) -> dict[str, Any]:
    """The [model] values that change the shape or the arithmetic of the network."""
    num_heads = _integer(llama, "num_attention_heads")
    width = _integer(llama, "hidden_size")
    vocab_size = _integer(llama, "vocab_size")
    if vocab_size > MAX_VOCABULARY:
        raise ConfigError(
            f"vocab_size of the checkpoint is {vocab_size}",
            hint=f"accepted: at most {MAX_VOCABULARY}, because tokens are stored in 16 bits",
        )
    return {
        "vocab_size": vocab_size,
        "width": width,
        "num_blocks": _integer(llama, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _integer(llama, "num_key_value_heads", num_heads),
        "ffn_width": _integer(llama, "intermediate_size"),
        "head_width": _integer(llama, "head_dim", width // num_heads),
        "tied_embedding": bool(llama.get("tie_word_embeddings", False)),
        "rope_theta": _float(_rotary(llama), "rope_theta", 10_000.0),
        "norm_epsilon": _float(llama, "rms_norm_eps", 1e-6),
    }


def _integer(llama: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of config.json; null counts as absent, as it does for transformers."""
    value = default if llama.get(key) is None else llama[key]
    if type(value) is not int or value < 1:
        raise _unfit(key, value, "a positive integer")
    return value


def _float(llama: Mapping[str, Any], key: str, default: float) -> float:
    """A number of config.json; null counts as absent."""
    value = default if llama.get(key) is None else llama[key]
    if type(value) not in (int, float):
        raise _unfit(key, value, "a number")
    return float(value)


def _end_and_pad(directory: Path, llama: Mapping[str, Any]) -> dict[str, int]:
    """The special token that ends a text, and one that may fill rows: any that no row holds."""
    special = _special_tokens(_read_json(directory / TOKENIZER_FILE))
    end = llama.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is not int or end not in special:
        raise _unfit("eos_token_id", end, "a special token of its tokenizer.json")
    pad = llama.get("pad_token_id")
    fitting = [token for token in special if token != end]
    if not fitting:
        raise ConfigError(
            f"the tokenizer in {directory} has one special token",
            hint="accepted: two or more, one to end documents and one to fill rows",
        )
    return {"end_token": end, "pad_token": pad if pad in fitting else fitting[0]}


def _special_tokens(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Number and text of each special token in a tokenizer.json, by number."""
    added = tokenizer.get("added_tokens", [])
    return dict(sorted((token["id"], token["content"]) for token in added if token["special"]))


def _read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one at a time; ConfigError if a file is damaged."""
    names = [WEIGHTS_FILE]
    if not (directory / WEIGHTS_FILE).exists():
        index = _read_json(directory / INDEX_FILE)
        names = sorted(set(index.get("weight_map", {}).values()))
    for name in names:
        try:
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{directory / name} cannot be read: {error}", hint="download it again"
            ) from error


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Tables that older checkpoints carry along, and a head that is the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tied_embedding)


def _copy(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.dtype not in _DTYPES or tensor.shape != parameter.shape:
        raise ConfigError(
            f"{name} of the checkpoint is {tensor.dtype} {list(tensor.shape)}",
            hint=f"accepted: float32, float16 or bfloat16, {list(parameter.shape)}",
        )
    if not is_finite(tensor):
        raise ConfigError(f"{name} of the checkpoint is not finite", hint="download it again")
    with torch.no_grad():
        parameter.copy_(tensor)


def _unfit(key: str, value: object, accepted: object) -> ConfigError:
    return ConfigError(
        f"{key} of the checkpoint is {json.dumps(value)}",
        hint=f"accepted: {accepted if isinstance(accepted, str) else json.dumps(accepted)}",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is not there, or is no JSON",
            hint="name the directory of a Llama checkpoint with its config.json, safetensors and "
            "tokenizer.json; pickled weights are never read",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a JSON object", hint="download it again")
    return values


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
