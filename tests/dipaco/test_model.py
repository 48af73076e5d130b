import math
from dataclasses import replace

import pytest
import torch

from dipaco.config import RunConfig, TopologyConfig
from dipaco.model import (
    KVCache,
    PathNet,
    initialize,
    num_parameters,
    parameter_shapes,
    read_module,
    write_module,
)
from dipaco.topology import ModuleID, Topology


def a_net(config: RunConfig, seed: int = 0) -> PathNet:
    net = PathNet(config.model)
    initialize(net, seed)
    return net


def naive_logits(net: PathNet, tokens: torch.Tensor) -> torch.Tensor:
    """Llama written out for one sequence: complex rotary, one head and one position at a time."""
    config = net.config
    weights = {name: value.double() for name, value in net.state_dict().items()}
    half = config.head_width // 2
    frequencies = [config.rope_theta ** (-2 * i / config.head_width) for i in range(half)]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weights[name]

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        angles = torch.tensor([position * f for f in frequencies], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angles)
        return torch.cat([turned.real, turned.imag])

    x = weights["model.embed_tokens.weight"][tokens]
    for block in range(config.num_blocks):
        p = f"model.layers.{block}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (h @ weights[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_kv_heads)
                mine = slice(head * 2 * half, (head + 1) * 2 * half)
                its = slice(group * 2 * half, (group + 1) * 2 * half)
                query = turn(q[t, mine], t)
                keys = torch.stack([turn(k[s, its], s) for s in range(t + 1)])
                scores = (keys @ query) / math.sqrt(config.head_width)
                heads.append(scores.softmax(0) @ v[: t + 1, its])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ weights[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[p + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config.tied_embedding else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def a_sharp_net(tiny: RunConfig, head_width: int, tied: bool) -> PathNet:
    model = replace(
        tiny.model, num_heads=4, head_width=head_width, num_kv_heads=2, tied_embedding=tied
    )
    net = a_net(replace(tiny, model=model))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)  # so that attention is not nearly uniform
    return net


@pytest.mark.parametrize(("head_width", "tied"), [(0, True), (12, False)])
def test_logits_are_those_of_a_llama_written_out(
    tiny: RunConfig, head_width: int, tied: bool
) -> None:
    net = a_sharp_net(tiny, head_width, tied)
    tokens = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = net(tokens)
    for row in range(2):
        assert torch.allclose(logits[row].double(), naive_logits(net, tokens[row]), atol=1e-4)


def test_a_cache_gives_the_logits_of_the_whole_sequence(tiny: RunConfig) -> None:
    longer = tiny.model.sequence_tokens + 6
    net = a_sharp_net(tiny, 12, tied=False)
    whole = a_sharp_net(
        replace(tiny, model=replace(tiny.model, sequence_tokens=longer)), 12, tied=False
    )
    tokens = torch.randint(0, 384, (1, longer), generator=torch.Generator().manual_seed(0))
    cache = KVCache(net, longer)
    with torch.no_grad():
        parts = [net(part, cache) for part in tokens.split([7, 1, 1, longer - 12, 1, 2], dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), whole(tokens), atol=1e-5)
        with pytest.raises(ValueError, match="cache"):
            net(tokens[:, :1], cache)


def test_parameters_are_named_as_in_llama_checkpoints(tiny: RunConfig) -> None:
    names = set(a_net(tiny).state_dict())
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    } <= names
    assert len(names) == 2 + 9 * 2
    untied = replace(tiny, model=replace(tiny.model, tied_embedding=False))
    assert set(a_net(untied).state_dict()) == names | {"lm_head.weight"}


@pytest.mark.parametrize("private", [False, True])
def test_modules_cover_the_network_and_move_it(tiny: RunConfig, private: bool) -> None:
    topology_config = TopologyConfig(
        levels=(2,), path_specific_blocks=(1,), path_specific_embedding=private
    )
    tiny = replace(tiny, model=replace(tiny.model, head_width=12, tied_embedding=private))
    topology = Topology.of(replace(tiny, topology=topology_config))
    source, target = a_net(tiny, 1), a_net(tiny, 2)
    modules = topology.modules_of(topology.paths[1])
    covered = [name for m in modules for name in parameter_shapes(tiny.model, topology, m)]
    assert sorted(covered) == sorted(source.state_dict())
    for module in modules:
        vector = read_module(source, topology, module)
        assert vector.shape == (num_parameters(tiny.model, topology, module),)
        write_module(target, topology, module, vector)
    for name, shape in parameter_shapes(tiny.model, topology, modules[1]).items():
        assert source.get_parameter(name).shape == shape
    tokens = torch.arange(10).view(1, 10)
    assert torch.equal(source(tokens), target(tokens))
    with pytest.raises(ValueError, match="parameters"):
        write_module(target, topology, ModuleID(0, 0), torch.zeros(3))


def test_initialization_follows_the_seed(tiny: RunConfig) -> None:
    tokens = torch.arange(10).view(1, 10)
    assert torch.equal(a_net(tiny, 3)(tokens), a_net(tiny, 3)(tokens))
    assert not torch.equal(a_net(tiny, 3)(tokens), a_net(tiny, 4)(tokens))
