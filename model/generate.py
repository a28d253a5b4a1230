"""Autoregressive sampling with a key/value cache: each new token costs one position, not T."""

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpt2 import GPT2

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
GREEDY = 1e-30  # below this temperature logits / temperature could overflow float32


def generate(
    model: GPT2,
    tokens: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    logit_bias: Tensor | None = None,
) -> Prompts:
    """Continue a batch of prompts.

    Args:
        model: used in the mode that the caller has set. With dropout, call `model.eval()` first.
        tokens: int64 (B, T) on the model's device; or a list of lists of ids of any lengths, each
            of which is continued as if it were alone. No prompt may be empty.
        max_new_tokens: T + max_new_tokens may not exceed the model's n_positions.
        temperature: divide the logits by it before the softmax; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; None means all of them.
        generator: on the model's device; the same seed gives the same text. None means torch's
            default generator.
        stop: the token that ends a row, such as 50256, <|endoftext|>; None for full length.
        logit_bias: (V,), on the model's device; added to the logits before they are divided by the
            temperature. -inf bans a token.

    If a row of logits has a NaN or +inf, or only -inf, sampling takes the last token.
    torch.multinomial would raise, and on CUDA end the process.

    Returns:
        The prompts with their continuations. For a tensor, int64 (B, T + n): ended rows repeat
        `stop`, and n is max_new_tokens or less, if all rows end earlier. For a list, a list of
        lists, each cut after its `stop`.

    Raises:
        ValueError: an argument out of its range, or an id outside the vocabulary.
    """
    options = max_new_tokens, temperature, top_k, generator, stop, logit_bias
    steps: list[Tensor] = list(stream(model, tokens, *options))
    if isinstance(tokens, Tensor):
        return torch.cat((tokens, *steps), dim=1)
    new = torch.cat(steps, dim=1).tolist() if steps else [[] for _ in tokens]
    ends = [row.index(stop) + 1 if stop in row else len(row) for row in new]
    return [prompt + row[:end] for prompt, row, end in zip(tokens, new, ends, strict=True)]


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def stream(
    model: GPT2,
    tokens: Tensor | list[list[int]],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    logit_bias: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield each step's new tokens, int64 (B, 1), as soon as they are sampled; see `generate`."""
    padding = None
    if not isinstance(tokens, Tensor):
        tokens, padding = _pad(tokens, model.wte.weight.device)
    _check(model, tokens, max_new_tokens, temperature, top_k, logit_bias)
    cache = model.new_cache(tokens.shape[-1] + max_new_tokens)
    ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        hidden = model.hidden_states(tokens, cache, padding)[:, -1]  # (B, C)
        logits = F.linear(hidden, model.wte.weight).float()  # (B, V)
        if logit_bias is not None:
            logits = logits + logit_bias
        tokens = _pick(logits, temperature, top_k, generator)  # (B, 1)
        if stop is not None:
            tokens = tokens.masked_fill(ended, stop)
            ended = tokens == stop
        yield tokens
        if stop is not None and ended.all():
            return


def _pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prompts, right-aligned in (B, T), and the widths of their padding, (B,)."""
    T = max(map(len, prompts), default=0)
    widths = [T - len(prompt) for prompt in prompts]
    rows = [[0] * width + prompt for width, prompt in zip(widths, prompts, strict=True)]
    if T in widths:
        raise ValueError("tokens: got an empty prompt; without text it is [50256], <|endoftext|>")
    return torch.tensor(rows, device=device), torch.tensor(widths, device=device)


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token per row: (B, V) -> int64 (B, 1)."""
    if temperature < GREEDY:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # exactly k, even if the k-th and the next are equal
    # Inverse transform sampling. torch.multinomial draws V random numbers per row instead of one,
    # which takes most of a CPU's time, and on CUDA it ends the process if a row is NaN.
    cdf = (logits / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)
    drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
    return drawn if ids is None else ids.gather(1, drawn)


def _check(
    model: GPT2,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    logit_bias: Tensor | None,
) -> None:
    T, limit, V = tokens.shape[-1], model.config.n_positions, model.config.vocab_size
    if not 0 <= max_new_tokens <= limit - T:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {T}, expected 0 to "
            f"{limit - T}: there are {limit} positions"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1, or None for all tokens")
    if logit_bias is not None and logit_bias.shape != (V,):
        raise ValueError(f"logit_bias: got shape {tuple(logit_bias.shape)}, expected ({V},)")
    if bool(((tokens < 0) | (tokens >= V)).any()):
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(f"tokens: got ids from {low} to {high}, expected them in [0, {V})")
