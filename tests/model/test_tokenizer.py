"""The tokenizer against recorded facts about GPT-2's vocabulary, without a network.

Ids and counts come from public sources, not from this code.
"""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_known_text_has_its_recorded_ids(tokenizer: Tokenizer) -> None:
    """Two prompts, with the ids of OpenAI's tokenizer, and the special token inside a text."""
    assert tokenizer.encode("Why did the chicken cross the road?") == [
        *[5195, 750, 262, 9015, 3272, 262, 2975, 30]
    ]
    assert tokenizer.encode("What is the answer to life, the universe, and everything?") == [
        *[2061, 318, 262, 3280, 284, 1204, 11, 262, 6881, 11, 290, 2279, 30]
    ]
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("a<|endoftext|>") == [64, 50256]


@given(st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    """Round trip for arbitrary Unicode, including control characters and emoji."""
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary(max_size=40).map(lambda b: b.decode("utf-8", errors="replace")))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    """Concatenated token_bytes against the UTF-8 of the text."""
    tokenizer = load_tokenizer()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_every_id_has_bytes_and_344_are_not_text_on_their_own(tokenizer: Tokenizer) -> None:
    """The recorded count of tokens that are not valid UTF-8; no two tokens are equal."""
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
    assert len(set(tokens)) == tokenizer.n_vocab
    assert tokens[50256] == b"<|endoftext|>"

    def is_text(token: bytes) -> bool:
        try:
            token.decode()
        except UnicodeDecodeError:
            return False
        return True

    assert sum(not is_text(token) for token in tokens) == 344


@pytest.mark.parametrize("token_id", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    """By token_bytes and by decode."""
    for refuse in (tokenizer.token_bytes, lambda i: tokenizer.decode([i])):
        with pytest.raises(ValueError, match=f"{token_id}.*50257"):
            refuse(token_id)


def test_no_network_and_no_cache_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A fresh tokenizer works with sockets blocked; an empty tiktoken cache stays empty."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tokenizer opened a socket")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_tokenizer.__wrapped__().encode("The fox") == [464, 21831]
    assert not list(tmp_path.iterdir())
