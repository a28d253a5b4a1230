"""Which tokens are target tokens, and the two-level target on them."""

import time

import regex
import torch
from torch import Tensor

from kernels import TwoLevelTarget
from model.tokenizer import Tokenizer
from train.command import expect

LETTER_X = "[Xx]"  # 984 tokens
TIME_LIMIT = 10.0  # seconds that a pattern may take for the whole vocabulary


def matching(tokenizer: Tokenizer, pattern: str) -> Tensor:
    """Return the tokens in which a regular expression is found, bool (V,).

    A token is searched as text, with its leading space if it has one. 344 tokens are not valid
    UTF-8 on their own; their bytes become lone surrogates. <|endoftext|>, a control token, never
    matches.

    Raises ValueError for a pattern that is invalid, matches no token or all, or takes too long.
    """
    end, found = time.monotonic() + TIME_LIMIT, []
    try:
        compiled = regex.compile(pattern)
        for i in range(tokenizer.eot):
            text = tokenizer.token_bytes(i).decode("utf-8", errors="surrogateescape")
            left = max(end - time.monotonic(), 1e-3)
            found.append(compiled.search(text, timeout=left) is not None)
    except (regex.error, OSError, ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        advice = "expected a regular expression in Python's syntax, without nested repetitions"
        raise ValueError(f"--tokens {pattern[:40]!r}: {error}; {advice}") from error
    expect(any(found), "tokens", repr(pattern[:40]), "a pattern that some token matches")
    expect(not all(found), "tokens", repr(pattern[:40]), "a pattern that not every token matches")
    return torch.tensor([*found, False])


def make_target(mask: Tensor, mass: float = 1.0) -> TwoLevelTarget:
    """Return the target that gives the tokens of a mask, bool (V,), the probability `mass`.

    Each of them gets alpha = mass / |S|, and each other token beta = (1 - mass) / (V - |S|).

    Raises ValueError unless alpha > beta, that is, mass > |S| / V.
    """
    size, vocab = int(mask.sum()), len(mask)
    uniform = size / vocab
    expected = f"more than {uniform:.4g}, the share of {size} of {vocab} tokens, and at most 1"
    expect(uniform < mass <= 1, "mass", mass, expected)
    return TwoLevelTarget(mask, mass / size, (1 - mass) / (vocab - size))
