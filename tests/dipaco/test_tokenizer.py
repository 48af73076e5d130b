import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipaco.errors import BadBytes, ConfigError
from dipaco.sequences import rows_of
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


def test_documents_become_rows_with_padded_tails() -> None:
    rows = rows_of(
        [[5] * 11, [6] * 8, [7] * 2],
        sequence_tokens=8,
        prefix_tokens=2,
        end_token=END,
        pad_token=PAD,
    )
    assert rows.dtype == "uint16"
    assert rows.tolist() == [
        [5] * 8,
        [5, 5, 5, END, PAD, PAD, PAD, PAD],
        [6] * 8,
    ]
    with pytest.raises(ConfigError, match="no document is as long"):
        rows_of([[7]], sequence_tokens=8, prefix_tokens=2, end_token=END, pad_token=PAD)
