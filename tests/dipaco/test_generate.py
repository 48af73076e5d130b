from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from dipaco.config import RunConfig
from dipaco.errors import ConfigError
from dipaco.generate import Generation, generate, stream_text
from dipaco.model import PathNet, initialize
from dipaco.tokenizer import train_tokenizer

PROMPT = [5, 9, 200, 17]


@pytest.fixture(scope="module")
def nets(tiny: RunConfig) -> list[PathNet]:
    nets = [PathNet(replace(tiny.model, tied_embedding=False)) for _ in range(3)]
    for seed, net in enumerate(nets):
        initialize(net, seed)
    return nets


def generation(
    nets: list[PathNet],
    choices: Iterator[int] | None = None,
    reroute_every: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    end_token: int = 0,
) -> Generation:
    choices = choices or iter([0])
    return generate(
        PROMPT,
        net_of=nets.__getitem__,
        choose=lambda tokens: next(choices),
        reroute_every=reroute_every,
        max_tokens=12,
        temperature=temperature,
        seed=seed,
        end_token=end_token,
    )


def greedily(nets: list[PathNet], numbers: Sequence[int]) -> list[int]:
    """Without a cache: each token from a whole forward pass of the net with that number."""
    text = PROMPT.copy()
    with torch.no_grad():
        for number in numbers:
            text.append(int(nets[number](torch.tensor([text]))[0, -1].argmax()))
    return text[len(PROMPT) :]


def test_greedy_text_is_that_of_whole_forward_passes(nets: list[PathNet]) -> None:
    plain = generation(nets)
    assert list(plain) == greedily(nets, [0] * 12)
    assert plain.paths == [0]


def test_the_coldest_text_is_the_greedy_one(nets: list[PathNet]) -> None:
    assert list(generation(nets, temperature=1e-42)) == list(generation(nets))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="the temperature is"):
            generation(nets, temperature=temperature)


def test_the_path_is_chosen_anew_and_the_cache_computed_only_for_another(
    nets: list[PathNet],
) -> None:
    switching = generation(nets, iter([1, 1, 2, 0]), reroute_every=3)
    assert list(switching) == greedily(nets, [1] * 6 + [2] * 3 + [0] * 3)
    assert switching.paths == [1, 2, 0]
    assert switching.num_switches == 2


def test_the_end_token_ends_the_text_and_is_left_out(nets: list[PathNet]) -> None:
    whole = list(generation(nets))
    end_token = next(token for token in whole if token != whole[0])
    assert list(generation(nets, end_token=end_token)) == whole[: whole.index(end_token)]


def test_samples_follow_the_seed(nets: list[PathNet]) -> None:
    texts = [list(generation(nets, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_impossible_prompts_are_refused(nets: list[PathNet]) -> None:
    for prompt, max_tokens in ([], 1), ([3], 65_536):
        with pytest.raises(ConfigError, match="prompt"):
            generate(
                prompt,
                net_of=nets.__getitem__,
                choose=lambda tokens: 0,
                reroute_every=0,
                max_tokens=max_tokens,
                temperature=0.0,
                seed=0,
                end_token=0,
            )


def test_text_streams_in_whole_characters() -> None:
    tokenizer = train_tokenizer(["some words"], 300)
    text = "naïve 日本 😀"
    prompt, tokens = tokenizer.encode("once "), tokenizer.encode(text)
    assert len(tokens) > len(text)
    pieces = list(stream_text(prompt, tokens, tokenizer))
    assert "".join(pieces) == text
    assert "😀" in pieces
    assert "".join(stream_text(prompt, tokens[:-1], tokenizer)) == text[:-1]
