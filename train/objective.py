"""Which tokens contain the letter, and how much of them there is in a text or a distribution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.tokenizer import Tokenizer

ROWS = 256  # rows of logits at a time in mass_on_members: 51 MB of float32 at 50,257 columns


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
    members = torch.zeros(tokenizer.n_vocab, dtype=torch.bool, device="cpu")
    for token_id in range(tokenizer.n_vocab):
        if token_id != tokenizer.eot:
            token = tokenizer.token_bytes(token_id)
            token = token if match_case else token.lower()
            members[token_id] = any(needle in token for needle in needles)
    if not members.any():
        raise ValueError(
            f"no token contains {contains!r}{' in this case' if match_case else ''}; "
            "choose another letter, or a shorter string"
        )
    return members


def member_rate(tokens: Tensor, members: Tensor) -> float:
    """R: the share of `tokens`, int64 of any shape, that are members."""
    return members[tokens].float().mean().item()


@torch.no_grad()
def mass_on_members(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """The probability that the model gives the members together, mean over rows, a scalar.

    For a target that lies wholly on the members (beta = 0) it is at least exp(-KL): merging the
    tokens into "member" and "other" cannot raise the divergence, and KL((1, 0) || (m, 1 - m)) is
    -log m; the mean over rows follows by Jensen.

    Args:
        hidden: (..., C), the model's hidden states.
        weight: (V, C), the LM head.
        index: ids of the members, int64 (|S|,); to find them in a mask would wait for the device.
    """
    masses = []
    for rows in hidden.flatten(0, -2).split(ROWS):
        logits = F.linear(rows, weight).float()
        masses.append((logits[:, index].logsumexp(1) - logits.logsumexp(1)).exp())
    return torch.cat(masses).mean()
