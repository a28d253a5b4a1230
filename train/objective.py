"""Which tokens are the goal, and how much of them there is in a text or a distribution."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TwoLevelTarget
from model.tokenizer import Tokenizer

ROWS = 4096  # rows at a time in mass_on_members: 16 MB of float32 logits of 984 members


def find_members(tokenizer: Tokenizer, contains: str, match_case: bool = False) -> Tensor:
    """The tokens whose bytes contain a string, as bool (n_vocab,).

    Bytes, not text: 344 tokens are no valid UTF-8 on their own. <|endoftext|> is never a member:
    it ends a document, and its spelling is nobody's text. In either case "X" has 984 members; with
    match_case "X" has 90 and "x" 896.

    Raises:
        ValueError: an empty string, or one that no token contains.
    """
    if not contains:
        raise ValueError("the letter is an empty string, which every token contains; give a letter")
    spellings = {contains}
    if not match_case:  # bytes.lower knows ASCII only; str knows the cases of every alphabet
        spellings = {contains.lower(), contains.upper()}
    needles = [s.encode() if match_case else s.encode().lower() for s in spellings]

    def contained(token: bytes) -> bool:
        token = token if match_case else token.lower()
        return any(needle in token for needle in needles)

    members = _members(tokenizer, contained)
    if not members.any():
        raise ValueError(
            f"no token contains {contains!r}{' in this case' if match_case else ''}; "
            "choose another letter, or a shorter string"
        )
    return members


def find_matches(tokenizer: Tokenizer, pattern: str, match_case: bool = False) -> Tensor:
    """The tokens in whose text a regular expression (Python's) is found, as bool (n_vocab,).

    A byte that is no UTF-8 on its own is read as a lone surrogate, which no ordinary pattern names.

    Raises:
        ValueError: no regular expression, or one that no token matches.
    """
    try:
        search = re.compile(pattern, 0 if match_case else re.IGNORECASE).search
    except re.error as error:
        raise ValueError(f"--regex {pattern!r}: {error}; expected Python's syntax") from error
    members = _members(
        tokenizer,
        lambda token: search(token.decode("utf-8", errors="surrogateescape")) is not None,
    )
    if not members.any():
        raise ValueError(f"--regex {pattern!r}: no token matches; choose another pattern")
    return members


def _members(tokenizer: Tokenizer, is_member: Callable[[bytes], bool]) -> Tensor:
    """The tokens whose bytes `is_member` accepts, never <|endoftext|>, as bool (n_vocab,)."""
    accepted = [
        token_id != tokenizer.eot and is_member(tokenizer.token_bytes(token_id))
        for token_id in range(tokenizer.n_vocab)
    ]
    return torch.tensor(accepted, device="cpu")


def read_tokens(tokenizer: Tokenizer, path: Path) -> Tensor:
    """The tokens that a UTF-8 file names, one a line, as bool (n_vocab,).

    A line of digits is an id; any other line is the text of one token, to which a space at its
    beginning belongs. Empty lines are skipped.

    Raises:
        ValueError: the file cannot be read or names no token; a line that is no token, or the
            special one.
    """
    members = torch.zeros(tokenizer.n_vocab, dtype=torch.bool, device="cpu")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tokens {path}: {error}; expected a UTF-8 text file") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        ids = [int(line)] if line.isdecimal() else tokenizer.encode(line)
        if len(ids) != 1 or not 0 <= ids[0] < tokenizer.n_vocab or ids[0] == tokenizer.eot:
            raise ValueError(
                f"--tokens {path}, line {number}: {line!r} is token {ids}; expected the text of "
                f"exactly one token, or an id from 0 to {tokenizer.eot - 1}"
            )
        members[ids] = True
    if not members.any():
        raise ValueError(f"--tokens {path}: no token; expected an id or a text on each line")
    return members


def choose_members(
    tokenizer: Tokenizer,
    letter: str | None = None,
    contains: Sequence[str] = (),
    regex: str | None = None,
    tokens: Path | None = None,
    match_case: bool = False,
) -> tuple[Tensor, str]:
    """The members, bool (n_vocab,), and the goal in words; without any choice, the letter X.

    Raises:
        ValueError: more than one goal, or one that no token meets.
    """
    goals = {
        "--letter": letter,
        "--contains": contains or None,
        "--regex": regex,
        "--tokens": tokens,
    }
    given = [option for option, value in goals.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one of them, each is a goal of its own")
    case = "in this case" if match_case else "in either case"
    if tokens is not None:
        return read_tokens(tokenizer, tokens), f"the tokens that {tokens} names"
    if regex is not None:
        members = find_matches(tokenizer, regex, match_case)
        return members, f"tokens that match {regex!r} {case}"
    strings = list(contains) or ["X" if letter is None else letter]
    found = [find_members(tokenizer, string, match_case) for string in strings]
    goal = f"tokens that contain {' or '.join(map(repr, strings))} {case}"
    return torch.stack(found).any(0), goal


def make_target(
    members: Tensor, alpha: float = 1.0, beta: float = 0.0, mass: float | None = None
) -> TwoLevelTarget:
    """The target on these members, bool (V,), by relative weights or by the members' share.

    Args:
        alpha, beta: relative weights of a member and of any other token.
        mass: instead, the probability of all members together; each gets mass / |S|.

    Raises:
        ValueError: both given, or a level of the members that is not above that of the others.
    """
    if mass is None:
        return TwoLevelTarget(members, alpha, beta)
    if (alpha, beta) != (1.0, 0.0):
        raise ValueError(f"--mass {mass:g} sets both levels; leave --alpha and --beta out")
    size, vocab = int(members.sum()), len(members)
    if not size / vocab < mass <= 1:
        raise ValueError(
            f"--mass {mass:g}: expected more than {size / vocab:.4g}, the share of {size} "
            f"of {vocab} tokens that are all alike, and at most 1"
        )
    return TwoLevelTarget(members, mass / size, (1 - mass) / (vocab - size))


def member_rate(tokens: Tensor, members: Tensor) -> float:
    """R: how many of `tokens`, int64 of any shape, are members, bool (V,); a share, 0 to 1."""
    return members[tokens].float().mean().item()


@torch.no_grad()
def mass_on_members(hidden: Tensor, weight: Tensor, index: Tensor, lse: Tensor) -> Tensor:
    """The probability that the model gives the members together, mean over rows, a scalar.

    The sum over the members of e^(z - lse): with lse at hand only their logits are needed, |S| of V
    columns of the LM head's product.

    For a target that lies wholly on the members (beta = 0) it is at least exp(-KL): merging the
    tokens into "member" and "other" cannot raise the divergence, and KL((1, 0) || (m, 1 - m)) is
    -log m; the mean over rows follows by Jensen.

    Args:
        hidden: (..., C), the model's hidden states.
        weight: (V, C), the LM head.
        index: ids of the members, int64 (|S|,); to find them in a mask would wait for the device.
        lse: (...), log of the sum over the vocabulary of e^logit.
    """
    head = weight[index]
    masses = [
        (F.linear(rows, head).float() - row_lse[:, None]).exp().sum(-1)
        for rows, row_lse in zip(
            hidden.flatten(0, -2).split(ROWS), lse.flatten().split(ROWS), strict=True
        )
    ]
    return torch.cat(masses).mean()
