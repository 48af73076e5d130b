"""The network of one path: a Llama, cut into modules by the topology.

RMSNorm, rotary positions, SwiGLU, grouped-query attention, and a head that is the embedding or,
where that is not tied, has its own matrix. Parameters are named as in Llama checkpoints. A module
is handed around as one flat vector: its parameters in canonical order (the order of
`parameter_shapes`), concatenated, float32.

Shape suffixes: B sequences, T tokens, S tokens seen so far, D width, H heads, K key/value heads,
C head width, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipaco.config import ModelConfig
from dipaco.tensors import new_vector
from dipaco.topology import ModuleID, Topology

_INITIAL_STD = 0.02  # GPT-2's, kept by Llama
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"  # only where the embedding is not tied


class Linear(nn.Linear):
    """A matrix for which no values are drawn: they are written, or drawn by `initialize`."""

    def reset_parameters(self) -> None:
        """Leave them as the memory was."""


class Embedding(nn.Embedding):
    """A table without values, likewise."""

    def reset_parameters(self) -> None:
        """Leave them as the memory was."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalize."""
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.epsilon)


class BlockCache:
    """Keys and values [B, K, S, C] of the tokens that one block has seen, allocated once."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys = keys
        self._values = values
        self._num_tokens = 0

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of the next tokens; returns all so far."""
        start, end = self._num_tokens, self._num_tokens + k_BKTC.shape[2]
        self._keys[:, :, start:end] = k_BKTC
        self._values[:, :, start:end] = v_BKTC
        self._num_tokens = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """Keys and values of one sequence in all blocks, so that the next tokens cost only themselves.

    Belongs to one network. Takes at most `capacity_tokens`, all of which are allocated at once;
    they may be more than `sequence_tokens`: rotary positions go on, less well the further.
    """

    def __init__(self, net: "PathNet", capacity_tokens: int) -> None:
        config, device = net.config, net.model.embed_tokens.weight.device
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        tables = rotary_tables(config, capacity_tokens)
        self._cos_SC, self._sin_SC = (table.to(device) for table in tables)
        shape = (1, config.num_kv_heads, capacity_tokens, config.head_width)
        self.blocks = [
            BlockCache(torch.empty(shape, device=device), torch.empty(shape, device=device))
            for _ in range(config.num_blocks)
        ]

    def advance(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for the next tokens; returns their rotation. ValueError if there is none."""
        start, end = self.num_tokens, self.num_tokens + num_tokens
        if end > self.capacity_tokens:
            raise ValueError(f"{end} tokens for a cache of {self.capacity_tokens}")
        self.num_tokens = end
        return self._cos_SC[start:end], self._sin_SC[start:end]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q_width = config.num_heads * config.head_width
        kv_width = config.num_kv_heads * config.head_width
        self.head_width = config.head_width
        self.is_grouped = config.num_kv_heads != config.num_heads
        self.q_proj = Linear(config.width, q_width, bias=False)
        self.k_proj = Linear(config.width, kv_width, bias=False)
        self.v_proj = Linear(config.width, kv_width, bias=False)
        self.o_proj = Linear(q_width, config.width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], cache: BlockCache | None = None
    ) -> Tensor:
        """Mix positions; `rotation` as `rotary_tables` returns it."""
        q_BHTC = rotate(self._heads(self.q_proj(x_BTD)), rotation)
        k_BKTC = rotate(self._heads(self.k_proj(x_BTD)), rotation)
        v_BKTC = self._heads(self.v_proj(x_BTD))
        k_BKSC, v_BKSC = (k_BKTC, v_BKTC) if cache is None else cache.extend(k_BKTC, v_BKTC)
        num_new, num_seen = q_BHTC.shape[2], k_BKSC.shape[2]
        mask_TS = None
        if num_new < num_seen:  # `is_causal` would align the first new token with the first seen
            mask_TS = x_BTD.new_ones(num_new, num_seen, dtype=torch.bool)
            mask_TS = mask_TS.tril(num_seen - num_new)
        mixed_BHTC = F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            mask_TS,
            is_causal=mask_TS is None,
            enable_gqa=self.is_grouped,
        )
        mixed: Tensor = self.o_proj(mixed_BHTC.transpose(1, 2).flatten(2))
        return mixed

    def _heads(self, x_BTD: Tensor) -> Tensor:
        num_sequences, num_tokens, width = x_BTD.shape
        heads = (num_sequences, num_tokens, width // self.head_width, self.head_width)
        return x_BTD.view(heads).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position on its own."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Block(nn.Module):
    """One transformer block, normalized before each half."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], cache: BlockCache | None = None
    ) -> Tensor:
        """Attention, then feed-forward, each added to its input."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, cache)
        out: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out


class Trunk(nn.Module):
    """Everything but the head; exists so that parameters are named as in Llama checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = RMSNorm(config.width, config.norm_epsilon)


class PathNet(nn.Module):
    """The network of one path. Parameters are uninitialized: write modules or call `initialize`."""

    rotary_cos: Tensor  # [sequence_tokens, C], as `rotary_tables` returns them
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.model = Trunk(config)
            if not config.tied_embedding:
                self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        # Buffers, not kept at their first use: `torch.compile` would trace anew what then changed.
        for name, table_TC in zip(
            ("rotary_cos", "rotary_sin"), rotary_tables(config, config.sequence_tokens), strict=True
        ):
            self.register_buffer(name, table_TC.to(device), persistent=False)

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Output [B, T, D] of the last block, before the final norm.

        With a cache, B is 1 and the tokens continue those that the cache has seen; without one, T
        is at most `sequence_tokens`.
        """
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        num_tokens = tokens_BT.shape[1]
        if cache is None:
            rotation = self.rotary_cos[:num_tokens], self.rotary_sin[:num_tokens]
            for block in self.model.layers:
                x_BTD = block(x_BTD, rotation)
            return x_BTD
        rotation = cache.advance(num_tokens)
        for block, block_cache in zip(self.model.layers, cache.blocks, strict=True):
            x_BTD = block(x_BTD, rotation, block_cache)
        return x_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the token after each position, from its hidden [..., D]."""
        tied = self.config.tied_embedding
        head_VD = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(self.model.norm(hidden), head_VD)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] of the token after each position; `cache` as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, cache))


def initialize(net: PathNet, seed: int) -> None:
    """Random parameters from a seed, the same on every device: GPT-2's scaled normal values."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = _INITIAL_STD / math.sqrt(2 * net.config.num_blocks)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            ends_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            values = torch.empty(parameter.shape)
            values.normal_(
                0.0, residual_std if ends_residual else _INITIAL_STD, generator=generator
            )
            parameter.copy_(values)


def rotary_tables(config: ModelConfig, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, C] of the rotary angles, as `rotate` takes them.

    The second half repeats the first, whose sines are negated.
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x_BHTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (c, c + C/2) by its angle, as Llama checkpoints expect."""
    cos_TC, sin_TC = (table.to(x_BHTC.dtype) for table in rotation)
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.addcmul(x_BHTC * cos_TC, torch.cat([second, first], dim=-1), sin_TC)


def parameter_shapes(
    config: ModelConfig, topology: Topology, module: ModuleID
) -> dict[str, torch.Size]:
    """Name and shape of each parameter of a module, in canonical order; builds no network."""
    if module.level == 0:
        matrix, norm = torch.Size([config.vocab_size, config.width]), torch.Size([config.width])
        shapes = {EMBEDDING: matrix, FINAL_NORM: norm}
        return shapes if config.tied_embedding else shapes | {HEAD: matrix}
    shapes = _block_shapes(config)
    return {
        f"model.layers.{block}.{name}": shape
        for block in topology.blocks_of(module)
        for name, shape in shapes.items()
    }


def num_parameters(config: ModelConfig, topology: Topology, module: ModuleID) -> int:
    """Number of parameters of a module."""
    return sum(shape.numel() for shape in parameter_shapes(config, topology, module).values())


def read_module(net: PathNet, topology: Topology, module: ModuleID) -> Tensor:
    """The flat vector of a module: a new float32 tensor on the CPU."""
    shapes = parameter_shapes(net.config, topology, module)
    vector = new_vector(sum(shape.numel() for shape in shapes.values()))
    for parameter, part in _parts(net, topology, module, vector):
        part.copy_(parameter)
    return vector


def write_module(net: PathNet, topology: Topology, module: ModuleID, vector: Tensor) -> None:
    """Set the parameters of a module from its flat vector; ValueError if the length is wrong."""
    for parameter, part in _parts(net, topology, module, vector.to(_device(net))):
        parameter.copy_(part)


def add_to_module(net: PathNet, topology: Topology, module: ModuleID, change: Tensor) -> None:
    """Add a flat vector to the parameters of a module; ValueError if the length is wrong."""
    for parameter, part in _parts(net, topology, module, change.to(_device(net))):
        parameter.add_(part)


def _parts(
    net: PathNet, topology: Topology, module: ModuleID, vector: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a module, detached, each with its part of a flat vector."""
    shapes = parameter_shapes(net.config, topology, module)
    sizes = [shape.numel() for shape in shapes.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"module {module} has {sum(sizes)} parameters, got {list(vector.shape)}")
    return [
        (net.get_parameter(name).detach(), part.view(shape))
        for (name, shape), part in zip(shapes.items(), torch.split(vector, sizes), strict=True)
    ]


def _device(net: PathNet) -> torch.device:
    return next(net.parameters()).device


def _block_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    width, ffn_width = config.width, config.ffn_width
    q_width = config.num_heads * config.head_width
    kv_width = config.num_kv_heads * config.head_width
    shapes = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (q_width, width),
        "self_attn.k_proj.weight": (kv_width, width),
        "self_attn.v_proj.weight": (kv_width, width),
        "self_attn.o_proj.weight": (width, q_width),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (ffn_width, width),
        "mlp.up_proj.weight": (ffn_width, width),
        "mlp.down_proj.weight": (width, ffn_width),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}
