import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from dipaco.errors import BadBytes
from dipaco.tokenizer import Tokenizer, train_tokenizer

END, PAD = 0, 1
TOKENIZER = train_tokenizer(["the cat sat on the mat, the hat"] * 10, 280)


@given(st.text())
def test_any_text_round_trips_without_special_tokens(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert not {END, PAD} & set(tokens)


def test_special_tokens_do_not_come_out_of_text() -> None:
    tokens = TOKENIZER.encode("a<|endoftext|>b<|pad|>")
    assert not {END, PAD} & set(tokens)
    assert TOKENIZER.encode_all(["the cat"]) == [TOKENIZER.encode("the cat")]


def test_a_tokenizer_travels_as_bytes() -> None:
    raw = TOKENIZER.to_bytes()
    copy = Tokenizer.from_bytes(raw, vocab_size=280, end_token=END, pad_token=PAD)
    assert copy.encode("the cat<|pad|>") == TOKENIZER.encode("the cat<|pad|>")
    assert copy.to_bytes() == raw
    for wrong in (b"", b"{}", raw[:-5], b"\xff\xfe"):
        with pytest.raises(BadBytes):
            Tokenizer.from_bytes(wrong, vocab_size=280, end_token=END, pad_token=PAD)
    with pytest.raises(BadBytes):
        Tokenizer.from_bytes(raw, vocab_size=270, end_token=END, pad_token=PAD)
    with pytest.raises(BadBytes):
        Tokenizer.from_bytes(raw, vocab_size=280, end_token=END, pad_token=5)


def test_a_tokenizer_of_a_checkpoint_does_not_cut_texts() -> None:
    backend = Backend.from_str(TOKENIZER.to_bytes().decode())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    raw = backend.to_str().encode()
    copy = Tokenizer.from_bytes(raw, vocab_size=280, end_token=END, pad_token=PAD)
    text = "the cat sat on the mat"
    assert copy.encode_all([text]) == [copy.encode(text)] == [TOKENIZER.encode(text)]
