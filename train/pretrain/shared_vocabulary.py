"""One row of wte shared by all tokens that a corpus lacks, and the cross-entropy with such a wte.

A corpus of 2 million tokens uses some 19,000 of the 50,257. The row of a token that never occurs is
only ever pushed away from the hidden states, as is every other such row, so they can all share
one, whose column counts once per unused token in the softmax:

    sum over V of e^z = sum over used tokens of e^z + n_unused e^z_unused

This is the full softmax, exactly, at 37 % of the work. In the end each unused token gets a copy.
"""

import math

import torch
from torch import Tensor


class SharedVocabulary:
    """The ids of a corpus, renumbered from 0; the last id stands for every token it lacks.

    `bias`, (size,), is added to the logits: n_unused e^z = e^(z + log n_unused).
    """

    def __init__(self, corpus: Tensor, n_vocab: int) -> None:
        used = corpus.unique()
        self.size = len(used) + 1
        self.bias = torch.zeros(self.size)
        self.bias[-1] = math.log(n_vocab - len(used))
        self._index = torch.full((n_vocab,), self.size - 1)
        self._index[used] = torch.arange(self.size - 1)

    def compact(self, ids: Tensor) -> Tensor:
        """Map GPT-2's ids to shared ids."""
        return self._index[ids]

    def expand(self, wte: Tensor) -> Tensor:
        """Give every token its own row: (size, C) -> (n_vocab, C)."""
        return wte[self._index]


def backpropagate_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, buffer: Tensor
) -> Tensor:
    """Return the mean of -log softmax(hidden @ weight.T + bias)[target] in nats, backward included.

    The gradients replace the logits in `buffer` (the idea of Liger Kernel's fused linear
    cross-entropy), then continue through `hidden` and into `weight.grad`.

    Args:
        hidden: (B, T, C). weight: (V, C), a leaf. bias: (V,), without gradient. target: (B, T) ids.
        buffer: (B T, V), overwritten; the products are computed in its dtype.
    """
    with torch.no_grad():
        h, w = hidden.flatten(0, 1).to(buffer.dtype), weight.to(buffer.dtype)
        at = target.reshape(-1, 1)  # (B T, 1)
        p = torch.mm(h, w.T, out=buffer).add_(bias.to(buffer.dtype))
        torch.softmax(p, 1, out=p)
        loss = -p.gather(1, at).float().clamp_min(1e-30).log().mean()
        p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))  # softmax - one-hot
        gradients = (p @ w).view_as(hidden).to(hidden.dtype), (p.T @ h).to(weight.dtype)
        torch.autograd.backward((hidden, weight), [g / len(p) for g in gradients])
    return loss
