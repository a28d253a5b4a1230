"""Which tokens are wanted, and the target distribution on them."""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import regex
import torch
from annotated_types import Ge, Le, MinLen
from pydantic import FiniteFloat
from torch import Tensor
from tyro.conf import UseAppendAction, arg

from kernels import TwoLevelTarget
from model.tokenizer import Tokenizer

Factor = Annotated[FiniteFloat, Ge(-100), Le(100)]  # e^100 leaves nothing to the other tokens
Factors = Annotated[tuple[Factor, ...], MinLen(1)]
TIME_LIMIT = 10.0  # seconds that a pattern may take for the whole vocabulary
optional = partial(arg, help_behavior_hint="(default: none)")


@dataclass(frozen=True)
class Goal:
    """Which tokens are wanted, and how much."""

    letter: str = "X"  # target tokens contain this letter
    contains: UseAppendAction[tuple[str, ...]] = ()
    """instead of --letter: contain this string; repeat the option for several, any will do"""
    regex: Annotated[str, optional(metavar="PATTERN")] = ""
    """instead of --letter: match this pattern, which is case-sensitive"""
    tokens: Annotated[str, optional(metavar="FILE")] = ""
    """instead of --letter: be listed in a file, an id or the text of one token per line"""
    match_case: bool = False  # tell "X" from "x" in --letter and --contains
    alpha: FiniteFloat = 1.0  # relative weight of a target token
    beta: FiniteFloat = 0.0  # relative weight of any other token; alpha > beta >= 0
    mass: Annotated[FiniteFloat | None, optional(metavar="FLOAT")] = None
    """instead of --alpha and --beta: the probability of all target tokens together"""
    tilt: Annotated[Factors | None, optional(metavar="G [G ...]")] = None
    """instead of --alpha, --beta: the start model with G nats on target tokens; a run per G"""
    strength: Annotated[Factors | None, arg(metavar="S [S ...]", help_behavior_hint="")] = None
    """with --tilt: a factor of G for each --contains, negative to suppress (default: 1 each)"""


def choose_tokens(tokenizer: Tokenizer, goal: Goal) -> tuple[Tensor, str]:
    """Return the strength of each token, float32 (n_vocab,), and the goal in words.

    It is 1 for the tokens of the goal and 0 for the others. With `strength` it is the sum of the
    strengths of the --contains strings in the token; a negative one suppresses the token.

    Raises ValueError for more than one goal, or one that no token meets.
    """
    values = goal.letter != "X", goal.contains, goal.regex, goal.tokens
    names = "--letter", "--contains", "--regex", "--tokens"
    given = [name for name, value in zip(names, values, strict=True) if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: got several goals, expected one of them")
    if goal.strength and len(goal.strength) != len(goal.contains):
        raise ValueError(f"--strength: got {len(goal.strength)}, expected one per --contains")
    if goal.tokens:
        return _read(tokenizer, Path(goal.tokens)), f"the tokens that {goal.tokens} names"
    if goal.regex:
        return _pattern(tokenizer, goal.regex), f"tokens that match {goal.regex!r}"
    strings = goal.contains or (goal.letter,)
    found = torch.stack([containing(tokenizer, s, goal.match_case) for s in strings])
    words = f"tokens that contain {' or '.join(map(repr, strings))}"
    words += " in this case" if goal.match_case else " in either case"
    if not goal.strength:
        return found.any(0).float(), words
    wanted = torch.tensor(goal.strength, device="cpu") @ found.float()
    if not (wanted > 0).any():
        raise ValueError("no token is wanted: give a positive --strength, or a negative --tilt")
    return wanted, f"{words}, weighed {', '.join(f'{s:g}' for s in goal.strength)}"


def containing(tokenizer: Tokenizer, string: str, match_case: bool = False) -> Tensor:
    """Return the tokens that contain a string, bool (n_vocab,).

    <|endoftext|> never counts: it is a control token. 984 tokens contain "X" in either case; 90
    "X", 896 "x".

    Raises ValueError for an empty string, or one that no token contains.
    """
    if not string:
        raise ValueError("got an empty string, which every token contains; give a letter")
    cases = [{c} if match_case else {c, *_other_case(c)} for c in string]
    pattern = "".join(f"[{''.join(map(regex.escape, case))}]" for case in cases)
    tokens = _matching(tokenizer, pattern)
    if not tokens.any():
        case = " in this case" if match_case else ""
        raise ValueError(f"no token contains {string[:40]!r}{case}; choose a shorter string")
    return tokens


def _other_case(letter: str) -> set[str]:
    """Return the letter in lower and upper case, unless that is another letter: "SS" of "ß"."""
    pair = letter.lower(), letter.upper()
    return {other for other in pair if (other.lower(), other.upper()) == pair}


def _pattern(tokenizer: Tokenizer, pattern: str) -> Tensor:
    """Return 1 for the tokens that a user's pattern matches, float32 (n_vocab,); or ValueError."""
    try:
        tokens = _matching(tokenizer, pattern)
        if not tokens.any():
            raise ValueError("no token matches")
    except (regex.error, OSError, ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        advice = "expected Python's syntax, without nested repetitions"
        raise ValueError(f"--regex {pattern[:40]!r}: {error}; {advice}") from error
    return tokens.float()


def _matching(tokenizer: Tokenizer, pattern: str) -> Tensor:
    """Search every token for a pattern, bool (n_vocab,).

    344 tokens are not valid UTF-8 on their own: their bytes are lone surrogates of the text.
    """
    compiled, end = regex.compile(pattern), time.monotonic() + TIME_LIMIT
    found = []
    for i in range(tokenizer.eot):
        text = tokenizer.token_bytes(i).decode("utf-8", errors="surrogateescape")
        left = max(end - time.monotonic(), 1e-3)
        found.append(compiled.search(text, timeout=left) is not None)
    return torch.tensor([*found, False], device="cpu")  # the last is <|endoftext|>


def _read(tokenizer: Tokenizer, path: Path) -> Tensor:
    """Read the strength of each token from a UTF-8 file, float32 (n_vocab,).

    One token per line: an id in digits, or the text of exactly one token, with its leading space if
    it has one. A number after a tab is its strength, else it is 1. Empty lines are skipped.

    Raises ValueError if the file cannot be read, names no token, or has a line that is not a token.
    """
    wanted = torch.zeros(tokenizer.n_vocab, device="cpu")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokens {path}: {error}; expected a UTF-8 text file") from error
    for number, line in enumerate(lines, start=1):
        text, _, strength = line.partition("\t")
        if not text:
            continue
        try:
            is_id = text.isascii() and text.isdigit() and len(text) < 7
            ids = [int(text)] if is_id else tokenizer.encode(text[:200])
            weight = float(strength or 1)
            if len(ids) != 1 or not 0 <= ids[0] < tokenizer.eot or not math.isfinite(weight):
                raise ValueError(f"token {ids[:5]}")
        except ValueError as error:
            raise ValueError(
                f"--tokens {path}, line {number}: {text[:40]!r} is {error}; expected the text of "
                f"exactly one token or an id from 0 to {tokenizer.eot - 1}"
            ) from error
        wanted[ids] = weight
    if not (wanted > 0).any():
        raise ValueError(f"--tokens {path}: no token is wanted; expected an id or a text per line")
    return wanted


def make_target(
    mask: Tensor, alpha: float = 1.0, beta: float = 0.0, mass: float | None = None
) -> TwoLevelTarget:
    """Return the target for a mask of target tokens, bool (V,); weights and mass as in `Goal`.

    Raises ValueError if both are given, or if target tokens would not get more than the others.
    """
    if mass is None:
        return TwoLevelTarget(mask, alpha, beta)
    if (alpha, beta) != (1.0, 0.0):
        raise ValueError(f"--mass {mass:g} sets both weights; leave out --alpha and --beta")
    size, vocab = int(mask.sum()), len(mask)
    if not size / vocab < mass <= 1:
        raise ValueError(
            f"--mass {mass:g}: expected more than {size / vocab:.4g}, the share of {size} "
            f"of {vocab} tokens under a uniform distribution, and at most 1"
        )
    return TwoLevelTarget(mask, mass / size, (1 - mass) / (vocab - size))
