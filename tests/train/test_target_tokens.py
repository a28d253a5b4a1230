"""The tokens that a pattern chooses, and the target's probabilities."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from model.tokenizer import load_tokenizer
from train import target_tokens
from train.target_tokens import LETTER_X, make_target, matching

TOKENIZER = load_tokenizer()
LETTERS = [TOKENIZER.token_bytes(i) for i in range(TOKENIZER.eot)]


@pytest.mark.parametrize(
    ("pattern", "of_bytes", "count"),
    [
        (LETTER_X, rb"[Xx]", 984),
        ("(?i)^ [A-Z]$", rb"^ [A-Za-z]$", 52),
        (r"é|^\udcff", rb"\xc3\xa9|^\xff$", None),  # and a byte that is no text of its own
    ],
)
def test_a_pattern_is_searched_in_a_token_as_text(pattern: str, of_bytes: bytes, count) -> None:
    """Against a search of the bytes."""
    expected = [i for i, letters in enumerate(LETTERS) if re.search(of_bytes, letters)]
    mask = matching(TOKENIZER, pattern)
    assert mask.shape == (50257,)  # with the control token, which never matches
    assert mask.nonzero().flatten().tolist() == expected
    assert count in (None, len(expected))


NEVER_ENDS, OVERFLOWS = "(a|a)*(a|a)*(a|a)*[^a]$", "x{99999999999}"
DEEP = "(" * 5000 + ")" * 5000


@pytest.mark.parametrize("pattern", [NEVER_ENDS, OVERFLOWS, DEEP, "(", "endoftext", ".*"])
def test_a_pattern_that_cannot_be_used_is_one_short_line(pattern: str, monkeypatch) -> None:
    """Whatever it is, within the time limit."""
    monkeypatch.setattr(target_tokens, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(type(TOKENIZER), "token_bytes", lambda self, i: b"a" * 14)
    with pytest.raises(ValueError, match=r"^--tokens '.*$") as raised:
        matching(TOKENIZER, pattern)
    assert len(str(raised.value)) < 250


def test_the_time_limit_is_that_of_the_whole_vocabulary(monkeypatch) -> None:
    """A token gets what those before it left."""
    compiled = Mock(**{"search.return_value": None})
    monkeypatch.setattr(target_tokens.regex, "compile", lambda pattern: compiled)
    few = SimpleNamespace(eot=99, token_bytes=lambda i: b"a")
    with pytest.raises(ValueError, match="a pattern that some token matches"):
        matching(few, "x")
    limits = [call.kwargs["timeout"] for call in compiled.search.call_args_list]
    assert limits == sorted(limits, reverse=True)
    assert target_tokens.TIME_LIMIT > limits[0] > limits[-1]


def test_the_mass_is_the_probability_of_all_target_tokens() -> None:
    """Summed over the dense target, in float64. 18 of 503 tokens have 18/503 if all are alike."""
    mask = torch.arange(503) % 29 == 0
    for mass in (0.5, 1.0):
        p = make_target(mask, mass).dense(torch.float64)
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        assert p[mask].sum().item() == pytest.approx(mass, abs=1e-12)
    for mass in (18 / 503, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"--mass .* expected more than 0\.03579"):
            make_target(mask, mass)
