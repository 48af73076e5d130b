import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from dipaco.config import ModelConfig
from dipaco.errors import ConfigError
from dipaco.generate import generate
from dipaco.llama import export_llama, model_section, read_llama
from dipaco.model import PathNet, initialize
from dipaco.tokenizer import Tokenizer, train_tokenizer

SHAPES = {
    "tied": {},
    "untied, grouped, wide heads": {
        "tied_embedding": False,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_width": 12,
        "rope_theta": 5000.0,
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words in a few lines", "and naïve 日本"], 300)


def a_net(tokenizer: Tokenizer, **shape: Any) -> PathNet:
    config = ModelConfig(
        **{
            "vocab_size": tokenizer.vocab_size,
            "width": 32,
            "num_blocks": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "ffn_width": 48,
            "sequence_tokens": 64,
            **shape,
        }
    )
    net = PathNet(config)
    initialize(net, 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)  # so that the likeliest token is not a matter of the last bit
    return net


@pytest.mark.filterwarnings("ignore")
def test_an_exported_tokenizer_puts_nothing_before_a_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As those of many Llamas do, which a run may start from; its paths are trained without."""
    from transformers import AutoTokenizer

    values = json.loads(tokenizer.to_bytes())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    raw = json.dumps(values).encode()
    assert Backend.from_str(raw.decode()).encode("some words").ids[0] == 0
    net = a_net(tokenizer)
    config = net.config
    theirs = Tokenizer.from_bytes(
        raw,
        vocab_size=config.vocab_size,
        end_token=config.end_token,
        pad_token=config.pad_token,
    )
    export_llama(net, theirs.to_bytes(), tmp_path / "llama")
    found = AutoTokenizer.from_pretrained(tmp_path / "llama")("some words")["input_ids"]
    assert found == tokenizer.encode("some words")


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    export_llama(a_net(tokenizer), tokenizer.to_bytes(), tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


# transformers' own warnings are its own affair.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_reads_an_exported_path_and_continues_a_prompt_alike(
    tokenizer: Tokenizer, shape: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = a_net(tokenizer, **shape)
    export_llama(net, tokenizer.to_bytes(), tmp_path / "llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = "some naïve 日本 words"
    prompt = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == prompt
    assert their_tokenizer.decode(prompt) == text
    assert their_tokenizer.eos_token_id == net.config.end_token
    assert their_tokenizer.pad_token_id == net.config.pad_token
    tokens = torch.randint(2, tokenizer.vocab_size, (2, 64))
    with torch.no_grad():
        assert torch.allclose(net(tokens), theirs(tokens).logits, atol=1e-4)
    ours = generate(
        prompt,
        net_of=lambda number: net,
        choose=lambda tokens: 0,
        reroute_every=0,
        max_tokens=40,
        temperature=0.0,
        seed=0,
        end_token=net.config.end_token,
    )
    (whole,) = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False).tolist()
    assert len(whole) == len(prompt) + 40
    assert list(ours) == whole[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_exported_path_comes_back(
    tokenizer: Tokenizer, shape: dict[str, Any], tmp_path: Path
) -> None:
    net = a_net(tokenizer, **shape)
    export_llama(net, tokenizer.to_bytes(), tmp_path)  # exists, but is empty
    assert ModelConfig(**model_section(tmp_path)) == net.config
    again = read_llama(tmp_path, net.config)
    for name, parameter in net.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    raw = (tmp_path / "tokenizer.json").read_bytes()
    size = tokenizer.vocab_size
    their = Tokenizer.from_bytes(raw, vocab_size=size, end_token=0, pad_token=1)
    assert their.encode("some words") == tokenizer.encode("some words")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_half_precision_checkpoints_of_older_versions_are_read(
    tokenizer: Tokenizer, exported: Path, dtype: torch.dtype
) -> None:
    def make_old(config: dict[str, Any]) -> None:
        del config["rope_parameters"], config["head_dim"], config["pad_token_id"]
        config.update(rope_theta=500.0, rope_scaling=None, eos_token_id=[0, 7])

    rewrite(exported / "config.json", make_old)
    tensors = {k: v.to(dtype) for k, v in load_file(exported / "model.safetensors").items()}
    (exported / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    files = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, exported / file)
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    section = model_section(exported)
    assert section["rope_theta"] == 500.0
    assert (section["end_token"], section["pad_token"]) == (0, 1)
    net = read_llama(exported, ModelConfig(**section))
    assert all(torch.equal(p, tensors[n].float()) for n, p in net.named_parameters())
    (exported / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-2-of-2"):
        read_llama(exported, ModelConfig(**section))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}),
        ("vocab_size", 128_256),
        ("num_hidden_layers", "two"),
        ("hidden_size", None),
    ],
)
def test_a_checkpoint_that_no_path_can_be_is_refused_by_name(
    tokenizer: Tokenizer, exported: Path, key: str, value: object
) -> None:
    rewrite(exported / "config.json", lambda config: config.update({key: value}))
    for read in (model_section, lambda path: read_llama(path, a_net(tokenizer).config)):
        with pytest.raises(ConfigError, match=key) as caught:
            read(exported)
        assert caught.value.hint


@pytest.mark.parametrize("end", [None, [], [[0]], 7])
def test_a_checkpoint_whose_texts_do_not_end_is_refused(exported: Path, end: object) -> None:
    rewrite(exported / "config.json", lambda config: config.update(eos_token_id=end))
    with pytest.raises(ConfigError, match="eos_token_id"):
        model_section(exported)


def test_older_scaled_positions_are_refused(exported: Path) -> None:
    def scale(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config["rope_scaling"] = {"type": "linear", "factor": 2.0}

    rewrite(exported / "config.json", scale)
    with pytest.raises(ConfigError, match="rope_scaling"):
        model_section(exported)


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 64), ("num_kv_heads", 1), ("tied_embedding", False), ("norm_epsilon", 1e-6)],
)
def test_a_configuration_that_does_not_fit_is_told_what_would(
    exported: Path, key: str, value: float
) -> None:
    config = ModelConfig(**model_section(exported))
    with pytest.raises(ConfigError, match=f"model.{key}") as caught:
        read_llama(exported, replace(config, **{key: value, "head_width": 16}))
    assert caught.value.hint == f"set {key} = {json.dumps(getattr(config, key))} in [model]"


def test_damaged_weights_are_refused(tokenizer: Tokenizer, exported: Path) -> None:
    config = a_net(tokenizer).config
    weights_file = exported / "model.safetensors"
    whole = load_file(weights_file)
    name = "model.norm.weight"

    def refused(change: dict[str, torch.Tensor], message: str) -> None:
        save_file(whole | change, weights_file)
        with pytest.raises(ConfigError, match=message):
            read_llama(exported, config)

    refused({"model.norm.bias": torch.ones(32)}, "model.norm.bias")
    refused({name: torch.ones(31)}, name)
    refused({name: torch.ones(32, dtype=torch.int8)}, name)
    refused({name: torch.full((32,), torch.inf, dtype=torch.float16)}, "finite")
    del whole[name]
    refused({}, name)
    weights_file.write_bytes(weights_file.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_llama(exported, config)
    shutil.rmtree(exported)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_llama(exported, config)


def test_an_export_is_whole_or_absent(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tokenizer.to_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export_llama(a_net(tokenizer), raw, tmp_path)
    with pytest.raises(ConfigError, match="heads"):
        export_llama(a_net(tokenizer, num_heads=6, head_width=8), raw, tmp_path / "new")

    def fail(file: Path, data: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dipaco.llama.write_atomically", fail)
    with pytest.raises(OSError, match="space"):
        export_llama(a_net(tokenizer), raw, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
