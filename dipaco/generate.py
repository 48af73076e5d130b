"""Text from a DiPaCo: tokens one by one, the path chosen anew as the text goes on (paper 2.4.3)."""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dipaco.errors import ConfigError
from dipaco.model import KVCache, PathNet
from dipaco.tokenizer import Tokenizer

MAX_CONTEXT_TOKENS = 65_536  # prompt and continuation: as many as the longest sequence of a run


_COLDEST = 1e-6  # below, the likeliest token is as good as certain, and logits would overflow


class Generation(Iterator[int]):
    """The tokens that continue a prompt; made by `generate`."""

    def __init__(self, tokens: Callable[[list[int]], Iterator[int]]) -> None:
        self.paths: list[int] = []
        """The path numbers taken so far, in order, neighbours different.

        For each of them the keys and values of all tokens before were computed once.
        """
        self._tokens = tokens(self.paths)

    def __next__(self) -> int:
        return next(self._tokens)

    @property
    def num_switches(self) -> int:
        """How often the text went on in another path than before."""
        return max(len(self.paths) - 1, 0)


def generate(  # noqa: PLR0913 - the text so far, how paths are chosen, how tokens are
    prompt_tokens: Sequence[int],
    *,
    net_of: Callable[[int], PathNet],
    choose: Callable[[Sequence[int]], int],
    reroute_every: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    end_token: int,
) -> Generation:
    """Continue a prompt until `end_token`, which is left out, or for `max_tokens`.

    `choose` maps the tokens so far to the number of a path. It is asked for the prompt and, where
    `reroute_every` is not 0, after every so many new tokens. Temperature 0 takes the likeliest
    token. ConfigError if it is no number from 0 up, or if the prompt is empty, or too long with
    what shall follow.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"the temperature is {temperature}", hint="accepted: a number from 0 up")
    if not prompt_tokens:
        raise ConfigError("the prompt is empty", hint="begin with at least one word")
    capacity_tokens = len(prompt_tokens) + max_tokens
    if capacity_tokens > MAX_CONTEXT_TOKENS:
        raise ConfigError(
            f"the prompt has {len(prompt_tokens)} tokens, and {max_tokens} shall follow",
            hint=f"accepted: at most {MAX_CONTEXT_TOKENS} in all",
        )

    def tokens(paths: list[int]) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed)
        text, unseen = list(prompt_tokens), list(prompt_tokens)
        for position in range(max_tokens):
            if not position or (reroute_every and position % reroute_every == 0):
                path = choose(text)
                if paths[-1:] != [path]:
                    paths.append(path)
                    net, unseen = net_of(path), text.copy()
                    cache = KVCache(net, capacity_tokens)
            token = _pick(_next_logits(net, unseen, cache), temperature, generator)
            if token == end_token:
                return
            yield token
            text.append(token)
            unseen = [token]

    return Generation(tokens)


def stream_text(
    prompt_tokens: Sequence[int], tokens: Iterable[int], tokenizer: Tokenizer
) -> Iterator[str]:
    """The text of `tokens`, which continue a prompt, as they come and in whole characters.

    Bytes at the end that are no whole character are left out.
    """
    step = tokenizer.decoder(prompt_tokens)
    for token in tokens:
        text = step(token)
        if text:
            yield text


@torch.no_grad()
def _next_logits(net: PathNet, unseen: Sequence[int], cache: KVCache) -> Tensor:
    """Logits [V], on the CPU, of the token after the unseen ones."""
    tokens_BT = torch.tensor([unseen], device=net.model.embed_tokens.weight.device)
    # Of a long prompt, only the last position needs its logits over the whole vocabulary.
    return net.logits(net.hidden(tokens_BT, cache)[0, -1]).float().cpu()


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature < _COLDEST:
        return int(logits_V.argmax())
    probabilities_V = (logits_V / temperature).softmax(0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
