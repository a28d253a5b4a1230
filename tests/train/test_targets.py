"""The tokens that a pattern chooses, the target's probabilities, and the bias that gives a share.

Against counts, closed forms in float64, and a run that reaches its share.
"""

import json
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.train import quick_run
from train import inputs, target_tokens
from train.report.runs import Evaluation
from train.share import solve, target_mass
from train.target_tokens import LETTER_X, make_target, matching
from train.xfactor import Options, get_batch
from weights import load_weights

TOKENIZER = load_tokenizer()
MASK = matching(TOKENIZER, LETTER_X)
LETTERS = [TOKENIZER.token_bytes(i) for i in range(TOKENIZER.eot)]


@pytest.mark.parametrize(
    ("pattern", "of_bytes"),
    [
        (LETTER_X, rb"[Xx]"),
        (r"é|^\udcff", rb"\xc3\xa9|^\xff$"),  # and a byte that is no text of its own
    ],
)
def test_a_pattern_is_searched_in_a_token_as_text(pattern: str, of_bytes: bytes) -> None:
    """Against a search of the bytes."""
    expected = [i for i, letters in enumerate(LETTERS) if re.search(of_bytes, letters)]
    mask = matching(TOKENIZER, pattern)
    assert mask.shape == (50257,)  # with the control token, which never matches
    assert mask.nonzero().flatten().tolist() == expected


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


def tilted(m: torch.Tensor, g: float) -> torch.Tensor:
    """Return the probability of the target tokens under the tilted start model."""
    return m * math.exp(g) / (1 - m + m * math.exp(g))


def test_the_mean_over_positions_is_the_share() -> None:
    """Of masses that differ, 0 and 1 among them; G is negative where S is below them, and
    logit(S) - logit(m) where all are m, however far apart the two."""
    m = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    m[:2] = torch.tensor([0.0, 1.0])
    for share in (0.01, 0.5, 0.9):
        assert tilted(m, solve(m, share)).mean().item() == pytest.approx(share, abs=1e-9)
    equal = torch.full((7,), 1e-9, dtype=torch.float64)
    expected = math.log(0.999 / 0.001) - math.log(1e-9 / (1 - 1e-9))
    assert solve(equal, 0.999) == pytest.approx(expected, abs=1e-9)


def test_a_run_starts_at_the_closed_form_and_reaches_its_share(small_start, tmp_path) -> None:
    """Before an update KL = G p - log(1 - m + m e^G), p and m as in share.py, in float64; 25 steps
    later the model has the mass p."""
    start = GPT2.from_state_dict(load_weights(small_start))
    tokens = get_batch(Options(batch=2, length=16), None, 0, torch.device("cpu"))
    m = target_mass(start, tokens, MASK)
    assert not m.requires_grad
    exact = start.double()(tokens).detach().softmax(-1)[..., MASK].sum(-1).flatten()
    torch.testing.assert_close(m, exact, rtol=1e-5, atol=0)
    size = ["--batch", "2", "--length", "16", "--steps", "25", "--lr", "1e-2", "--share", "0.3"]
    words = ["--model", str(small_start), *size, "--inputs", "random", "--out", str(tmp_path)]
    quick_run.command(words, SAVE_EVERY=60)
    about = json.loads((tmp_path / "config.json").read_text())["xfactor"]
    p = tilted(exact, g := about["g"])
    expected = (g * p - torch.log(1 - exact + exact * math.exp(g))).mean().item()
    assert quick_run.losses(tmp_path)[0] == pytest.approx(expected, rel=1e-3)
    ended = target_mass(GPT2.from_state_dict(load_weights(tmp_path)), tokens, MASK)
    assert ended.mean().item() == pytest.approx(p.mean().item(), abs=0.06)
    lines = quick_run.logged(tmp_path)
    assert [line["step"] for line in lines if "limit" in line] == [0]
    measured = [fields for line in lines for fields in (line.get("limit"), line.get("evaluation"))]
    assert {(*fields,) for fields in measured if fields} == {Evaluation.__match_args__}


def test_half_of_the_samples_are_the_tilted_start_s(small_start, monkeypatch) -> None:
    """The others are the start's own, which writes 984 of 50,257 tokens at random."""
    for name, value in {"TEXTS": 8, "TOKENS": 32, "BATCH": 4}.items():
        monkeypatch.setattr(inputs, name, value)
    start = inputs.load_start(str(small_start), random=False, seed=0)
    text, _ = inputs.make_inputs("samples", start, make_target(MASK), 16, share=0.5, seed=0)
    own, tilted = MASK[text].view(2, -1).double().mean(1)
    assert own < 0.1
    assert 0.35 < tilted < 0.65
