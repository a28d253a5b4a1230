"""The tokenizer against recorded facts about GPT-2's vocabulary, without a network.

Ids and counts come from public sources, not from this code.
"""

import pytest

from model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_known_text_has_its_recorded_ids(tokenizer: Tokenizer) -> None:
    """The ids of OpenAI's tokenizer, also for the special token inside a text."""
    ids = [5195, 750, 262, 9015, 3272, 262, 2975, 30]
    assert tokenizer.encode("Why did the chicken cross the road?") == ids
    assert tokenizer.encode("a<|endoftext|>") == [64, 50256]


def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    """Control characters, spaces, accents, characters of three and four bytes, joined ones; the
    bytes of the tokens are the UTF-8 of the text. Bytes that are no text become U+FFFD."""
    text = "".join(map(chr, range(0x250))) + "  \r\n don't 1,234 日本語 👩‍🔬 e\u0301 \U0010ffff"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(tokenizer.encode("日")[:1]) == "\ufffd"


def test_the_vocabulary_has_its_recorded_counts(tokenizer: Tokenizer) -> None:
    """50,257 different tokens, the last <|endoftext|>; 344 are not UTF-8 on their own."""
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
    assert len(set(tokens)) == tokenizer.n_vocab == 50257
    assert tokens[tokenizer.eot] == b"<|endoftext|>"
    assert sum(token.decode(errors="ignore").encode() != token for token in tokens) == 344


@pytest.mark.parametrize("token_id", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    """The message has the id and the vocabulary's size."""
    with pytest.raises(ValueError, match=f"{token_id}.*50257"):
        tokenizer.decode([token_id])


def test_no_network_and_no_cache_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A fresh tokenizer works with sockets blocked; an empty tiktoken cache stays empty."""
    monkeypatch.setattr("socket.socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_tokenizer.__wrapped__().encode("The fox") == [464, 21831]
    assert not list(tmp_path.iterdir())
