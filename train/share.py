"""The share: how often the model should write target tokens, and the bias that makes it do so.

Let p(v) be the probability of token v at some position under the start model (before fine-tuning),
and m the sum of p over the target tokens there. Adding G nats to the logit of every target token
gives the tilted model

    q(v) = p(v) e^(G [v is a target token]) / Z,    Z = 1 - m + m e^G                    (1)

    probability of the target tokens:               m e^G / (1 - m + m e^G)              (2)

Of all distributions that give the target tokens the probability (2), q has the least KL(q || p).
Let r be another. Then KL(r || p) - KL(q || p) = KL(r || q) >= 0, because log q - log p is one
constant on the target tokens and another on the rest, and r and q give both sets the same mass.
This is an exponential tilt. In the language of reinforcement learning, q maximises G times the
probability of a target token minus KL(q || p), token by token.

`--share S` solves for the G at which the mean of (2), over positions of text sampled from the start
model, is S. G = 0 gives the start model's own share, and an S below that makes G negative.
"""

import torch
from torch import Tensor

from model import GPT2
from train.command import progress

ROWS = 8  # texts at a time: of 128 tokens they have 206 MB of float32 logits


@torch.no_grad()
def target_mass(model: GPT2, texts: Tensor, mask: Tensor) -> Tensor:
    """Return m of (1) at every position of texts (N, T), float64 (N * T,); mask is bool (V,)."""
    masses = []
    for rows in progress(texts.split(ROWS), "measuring texts", -(-len(texts) // ROWS)):
        log_p = model(rows).float().log_softmax(-1)  # (ROWS, T, V)
        masses.append(log_p[..., mask].double().exp().sum(-1).flatten())
    return torch.cat(masses)


def solve(mass: Tensor, share: float) -> float:
    """Return the G, in nats, that makes the mean of (2) over positions equal to S.

    mass: m at each position, (n,). share: S, between 0 and 1.
    """
    odds = mass.double().log() - (-mass.double()).log1p()  # log m / (1 - m)
    low, high = -200.0, 200.0
    for _ in range(60):  # the mean grows with G: halve the interval down to one float64
        g = (low + high) / 2
        if torch.sigmoid(odds + g).mean() < share:
            low = g
        else:
            high = g
    return g
