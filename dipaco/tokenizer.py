"""Byte-level BPE, trained on the corpus: any text can be encoded, and decoded again exactly."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from dipaco.errors import BadBytes

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")  # numbers 0 and 1


class Tokenizer:
    """Text to token ids and back. Special tokens never come out of text, whatever it says."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True
        # That of a checkpoint may cut texts to what its model was trained on.
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._backend.decode(tokens)

    def decoder(self, before: Sequence[int]) -> Callable[[int], str | None]:
        """A function to call with each token after those `before`: gives the text that became
        whole with it, None while a character is not.
        """
        return partial(decoders.DecodeStream(list(before), True).step, self._backend)

    def to_bytes(self) -> bytes:
        """The tokenizer as the JSON that Hugging Face's tools read (`tokenizer.json`)."""
        return self._backend.to_str().encode()

    @classmethod
    def from_bytes(
        cls, raw: bytes, *, vocab_size: int, end_token: int, pad_token: int
    ) -> "Tokenizer":
        """The inverse of `to_bytes`; BadBytes if it lacks these special tokens, or is larger."""
        try:
            backend = Backend.from_str(raw.decode())
        except Exception as error:  # the library raises nothing narrower
            raise BadBytes(f"not a tokenizer: {error!s:.100}") from error
        added = backend.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        if not {end_token, pad_token} <= special:
            raise BadBytes("not a tokenizer of this run: its special tokens are others")
        if backend.get_vocab_size() > vocab_size:
            raise BadBytes("not a tokenizer of this run: its vocabulary is larger")
        return cls(backend)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; fewer if the texts do not give that many.

    Texts are read once and not kept; each of their distinct words takes about 1.5 KB.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
