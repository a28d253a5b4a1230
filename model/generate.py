"""Autoregressive sampling with a key/value cache: each new token costs one position, not T."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpt2 import GPT2


@torch.no_grad()  # not inference_mode: its tensors could not be trained on afterwards
def generate(
    model: GPT2,
    tokens: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a batch of prompts; always to full length, <|endoftext|> does not end it.

    Args:
        model: left in the mode it was in; dropout is off while sampling.
        tokens: prompts of equal length, int64 (B, T), T >= 1, on the model's device.
        max_new_tokens: T + max_new_tokens may not exceed the model's n_positions.
        temperature: logits are divided by it before the softmax; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; None means all of them.
        generator: on the model's device; the same seed gives the same text. None: torch's own.

    Returns:
        int64 (B, T + max_new_tokens): the prompts and their continuations.

    Raises:
        ValueError: an argument out of its range, or an id outside the vocabulary.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(tokens.shape[1] + max_new_tokens)
        newest = tokens  # first the whole prompt, then one token at a time
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(newest, cache)[:, -1]  # (B, C): the last is enough
            logits = F.linear(hidden, model.wte.weight)  # (B, V)
            newest = _pick(logits, temperature, top_k, generator)  # (B, 1)
            tokens = torch.cat((tokens, newest), dim=1)
    finally:
        model.train(was_training)
    return tokens


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    logits, ids = logits.topk(top_k)  # exactly k, also where the k-th and the next are equal
    return ids.gather(1, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def _check(
    model: GPT2, tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None
) -> None:
    config = model.config
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
        raise ValueError(
            f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, expected torch.int64 of "
            "shape (B, T), neither of them 0; an empty prompt is [[50256]], <|endoftext|>"
        )
    if max_new_tokens < 0 or tokens.shape[1] + max_new_tokens > config.n_positions:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {tokens.shape[1]}, expected 0 "
            f"to {config.n_positions - tokens.shape[1]}: there are {config.n_positions} positions"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1, or None for all tokens")
    if not tokens.is_meta and bool(((tokens < 0) | (tokens >= config.vocab_size)).any()):
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(
            f"tokens: got ids from {low} to {high}, expected them in [0, {config.vocab_size})"
        )
