"""The tokens that the goal's options choose, the goal's name, and the target's probabilities."""

import re
import time
from pathlib import Path

import pytest
import torch

from model.tokenizer import load_tokenizer
from train import target_tokens
from train.target_tokens import Goal, choose_tokens, containing, make_target

TOKENIZER = load_tokenizer()


def choose(**goal: object) -> tuple[torch.Tensor, str]:
    """Return what these options of the goal choose."""
    return choose_tokens(TOKENIZER, Goal(**goal))


def ids(wanted: torch.Tensor) -> set[int]:
    return set(wanted.nonzero().flatten().tolist())


def test_without_a_choice_the_goal_is_the_letter_x_in_either_case() -> None:
    """984 tokens, as recorded in test_tokenizer.py; the special token is none of them."""
    wanted, goal = choose()
    assert wanted.sum() == 984
    assert not wanted[TOKENIZER.eot]
    assert goal == "tokens that contain 'X' in either case"


def test_several_strings_choose_the_tokens_with_any_of_them() -> None:
    """The union of what each chooses alone, in their case if asked."""
    wanted, goal = choose(contains=("qu", "é"), match_case=True)
    expected = containing(TOKENIZER, "qu", True) | containing(TOKENIZER, "é", True)
    assert torch.equal(wanted, expected.float())
    assert goal == "tokens that contain 'qu' or 'é' in this case"


def test_a_pattern_of_one_letter_is_the_letter() -> None:
    """For a letter of ASCII and one beyond; the search on text, the other on bytes."""
    for letter in "Xé":
        wanted, goal = choose(regex=letter)
        assert torch.equal(wanted.bool(), containing(TOKENIZER, letter, match_case=True))
        assert goal == f"tokens that match {letter!r}"


def test_a_pattern_sees_a_token_as_text() -> None:
    """Anchors and classes, counted by hand over the bytes."""
    wanted, _ = choose(regex=r"^ \d\d$")
    expected = {
        i for i in range(TOKENIZER.eot) if re.fullmatch(rb" [0-9][0-9]", TOKENIZER.token_bytes(i))
    }
    assert ids(wanted) == expected
    assert len(expected) == 100


def test_a_file_names_tokens_by_id_or_text(tmp_path: Path) -> None:
    """A space at the beginning belongs to the text; an empty line names nothing."""
    path = tmp_path / "tokens.txt"
    path.write_text("55\n\nX\n the\nthe\n")
    wanted, goal = choose(tokens=str(path))
    assert ids(wanted) == {55, *TOKENIZER.encode(" the"), *TOKENIZER.encode("the")}
    assert goal == f"the tokens that {path} names"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("55\nX marks the spot\n", "line 2: 'X marks the spot'"),
        ("50257\n", r"line 1: '50257' is token \[50257\]"),
        ("50256\n", "from 0 to 50255"),
        ("<|endoftext|>\n", "exactly one token"),
        ("\n", "no token"),
        (None, "No such file"),
    ],
)
def test_a_file_that_names_no_tokens_is_refused(text, message, tmp_path: Path) -> None:
    """With the line and what it was read as."""
    path = tmp_path / "tokens.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        choose(tokens=str(path))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"letter": "x", "contains": ("Y",)}, "--letter and --contains"),
        ({"regex": "X", "tokens": "none"}, "--regex and --tokens"),
        ({"regex": "("}, "--regex"),
        ({"regex": "XQZJ"}, "no token matches"),
        ({"contains": ("X", "XQZJ")}, "no token contains 'XQZJ'"),
    ],
)
def test_a_goal_that_is_none_or_two_is_refused(goal, message) -> None:
    """The message names the options or the value."""
    with pytest.raises(ValueError, match=message):
        choose(**goal)


@pytest.mark.parametrize(
    ("letter", "same"),
    [
        ("ß", "ß"),
        ("\u0131", "\u0131"),
        ("\N{KELVIN SIGN}", None),
        ("é", "É"),
        ("x", "X"),
    ],
)
def test_a_letter_means_itself_and_its_other_case(letter: str, same: str | None) -> None:
    """Not what Python makes of it: "SS" of "ß", "I" of a dotless i, "k" of the Kelvin sign;
    counted over the bytes."""
    if same is None:
        with pytest.raises(ValueError, match="no token contains"):
            containing(TOKENIZER, letter)
        return
    spellings = [letter.encode(), same.encode()]
    expected = {
        i for i in range(TOKENIZER.eot) if any(s in TOKENIZER.token_bytes(i) for s in spellings)
    }
    assert ids(containing(TOKENIZER, letter)) == expected
    assert 0 < len(expected) < 1000


def test_a_pattern_is_case_sensitive_unless_it_says_otherwise() -> None:
    """Tokens of a space and one capital: 26, and twice as many with (?i)."""
    assert choose(regex="^ [A-Z]$")[0].sum() == 26
    assert choose(regex="(?i)^ [A-Z]$")[0].sum() == 52


@pytest.mark.parametrize(
    "pattern", ["(a|a)*(a|a)*(a|a)*b$", "x{99999999999}", "(" * 5000 + ")" * 5000]
)
def test_a_pattern_that_never_ends_or_overflows_is_one_short_line(pattern, monkeypatch) -> None:
    """Within the time limit, here half a second."""
    monkeypatch.setattr(target_tokens, "TIME_LIMIT", 0.5)
    long_token = b"a" * 5000
    monkeypatch.setattr(type(TOKENIZER), "token_bytes", lambda self, i: long_token)
    began = time.monotonic()
    with pytest.raises(ValueError, match="--regex") as raised:
        choose(regex=pattern)
    assert time.monotonic() - began < 10
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_a_file_may_begin_with_a_byte_order_mark_and_give_strengths(tmp_path: Path) -> None:
    """After a tab; ids are digits of ASCII, so an Arabic five is a text."""
    path = tmp_path / "tokens.txt"
    path.write_text("55\t2.5\r\nX\t-1\n the\n", encoding="utf-8-sig")
    wanted, _ = choose(tokens=str(path))
    found = {i: wanted[i].item() for i in ids(wanted)}
    assert found == {55: 2.5, TOKENIZER.encode("X")[0]: -1.0, TOKENIZER.encode(" the")[0]: 1.0}
    path.write_text("\N{ARABIC-INDIC DIGIT FIVE}\n")
    with pytest.raises(ValueError, match="line 1"):
        choose(tokens=str(path))


def test_the_error_of_a_huge_line_is_short(tmp_path: Path) -> None:
    """A megabyte of digits is not an id, nor one token."""
    path = tmp_path / "tokens.txt"
    path.write_text("7" * 1_000_000)
    with pytest.raises(ValueError, match="line 1: '777") as raised:
        choose(tokens=str(path))
    assert len(str(raised.value)) < 400


def test_strengths_add_up() -> None:
    """Over the strings that a token contains; a negative one suppresses."""
    wanted, goal = choose(contains=("x", "ing"), strength=(1.0, -0.5))
    x, ing = (containing(TOKENIZER, s).float() for s in ("x", "ing"))
    assert torch.equal(wanted, x - 0.5 * ing)
    assert set(wanted.tolist()) == {0.0, 0.5, 1.0, -0.5}
    assert goal.endswith("weighed 1, -0.5")


@pytest.mark.parametrize("mass", [0.5, 0.999, 1.0])
def test_the_mass_is_the_probability_of_all_target_tokens(mass: float) -> None:
    """Summed over the dense target, in float64."""
    mask = torch.arange(503) % 29 == 0
    p = make_target(mask, mass=mass).dense(torch.float64)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert p[mask].sum().item() == pytest.approx(mass, abs=1e-12)


@pytest.mark.parametrize("mass", [18 / 503, 0.0, -1.0, 1.1, float("nan")])
def test_a_mass_that_prefers_no_target_token_is_refused(mass: float) -> None:
    """18 of 503 tokens have 18/503 already if all are alike."""
    with pytest.raises(ValueError, match=r"--mass .* expected more than 0\.03579"):
        make_target(torch.arange(503) % 29 == 0, mass=mass)


def test_mass_and_weights_together_are_refused() -> None:
    """One of them would have to be ignored."""
    with pytest.raises(ValueError, match="leave out --alpha and --beta"):
        make_target(torch.arange(503) % 29 == 0, alpha=2.0, mass=0.5)
