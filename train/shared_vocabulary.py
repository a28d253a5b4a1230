"""One row of the vocabulary for all the tokens that a corpus lacks, and the loss over such rows.

A corpus of 2 million tokens uses some 19,000 of the 50,257. A row of wte whose token never occurs
is only ever pushed away from the hidden states, like every other such row, so all of them can share
one row, whose column counts for all of them in the softmax:

    sum over V of e^z = sum over used tokens of e^z + n_unused e^z_unused

which is the full softmax, exactly, at 37 % of the work. In the end each gets a copy of the row.
"""

from typing import Any

import torch
from torch import Tensor


class SharedVocabulary:
    """Ids of the corpus numbered from 0; one more id stands for every token that never occurs."""

    def __init__(self, corpus: Tensor, n_vocab: int) -> None:
        self.used = corpus.unique()
        self.n_unused = n_vocab - len(self.used)
        self.size = len(self.used) + 1
        self._index = torch.full((n_vocab,), self.size - 1)
        self._index[self.used] = torch.arange(self.size - 1)

    def compact(self, ids: Tensor) -> Tensor:
        """Full ids to shared ids."""
        return self._index[ids]

    def expand(self, wte: Tensor) -> Tensor:
        """(size, C) to (n_vocab, C): every unused token gets a copy of the shared row."""
        return wte[self._index]


class CrossEntropy(torch.autograd.Function):
    """Mean over rows of -log softmax(hidden @ weight.T + bias)[target], in one reused buffer.

    The gradients are formed in the forward pass, where the logits are at hand, and the logits give
    way to them in place (the idea of Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, buffer: Tensor
    ) -> Tensor:
        """The loss, a scalar, in nats a row.

        Args:
            hidden, weight, bias: (N, C), (V, C) and (V,); the bias gets no gradient.
            target: ids, int64 (N,).
            buffer: (N, V), overwritten; its dtype is that of the products.
        """
        h, w, at = hidden.to(buffer.dtype), weight.to(buffer.dtype), target[:, None]
        p = torch.mm(h, w.T, out=buffer).add_(bias.to(buffer.dtype))
        torch.softmax(p, 1, out=p)
        loss = -p.gather(1, at).float().clamp_min(1e-30).log().mean()
        p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))  # softmax - one-hot
        ctx.save_for_backward((p @ w).to(hidden.dtype), (p.T @ h).to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass has left; `grad` is the loss's, a scalar."""
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_hidden)
        return grad * grad_hidden, grad * grad_weight, None, None, None
