"""The fused loss toward a teacher in plain PyTorch: torch_kl_div.py, for two rows of logits.

    u = t, plus G on S if tilted,   P = softmax(u),   q = softmax(z)
    x = u - max u,   y = z - max z,   r = sum e^x,   s = sum e^y                     (1)
    KL     = (sum e^x (x - y)) / r + log s - log r                                   (2)
    dKL/dz = q - P                                                                   (3)

Numerical precision. Neither lse enters the loss: (2) sums x - y, which is 0 where z and u are
equal, and the maxima cancel. P and q go through the same operations in the same order, so that
z = u bit for bit gives a loss and a gradient of exactly 0. Near that point the loss is a difference
of numbers of the size of log s, which leaves an absolute error of about 1e-6 nats.

Hazard: where u is -inf, P is 0 and x - y is infinite or NaN: the product must be left out.
"""

import torch
from torch import Tensor

from .reference import compute_dtype
from .target import Teacher
from .torch_kl_div import tiles


def forward(logits: Tensor, target: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp per row, (N,) each, in the dtype of the arithmetic; and norm, (N, 3),
    whose first column is the log-sum-exp of u."""
    loss = logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
    lse, norm = torch.empty_like(loss), loss.new_ones(len(loss), 3)
    for rows, (y, x, e) in tiles(logits, 3):
        z = logits[rows]
        _tilted(target, rows, x)
        top_z, top_u = z.amax(-1, keepdim=True).to(loss.dtype), x.amax(-1, keepdim=True)
        s = torch.exp(torch.sub(z, top_z, out=y), out=e).sum(-1, keepdim=True)  # (1)
        r = torch.exp(x.sub_(top_u), out=e).sum(-1, keepdim=True)
        log_s, log_r = s.log(), r.log()
        terms = torch.sub(x, y, out=y).mul_(e).masked_fill_(e == 0, 0.0)
        loss[rows] = (terms.sum(-1, keepdim=True) / r + (log_s - log_r)).squeeze(-1)  # (2)
        lse[rows] = (top_z + log_s).squeeze(-1)
        norm[rows, 0] = (top_u + log_r).squeeze(-1)
    return loss, lse, norm


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: Teacher, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss (N,) times (3) to out (N, V), which may be the logits themselves. Each
    softmax is divided by its pairwise sum, for the reason that torch_kl_div.py gives."""
    for rows, (q, p) in tiles(logits, 2):
        _tilted(target, rows, p)
        torch.softmax(p, -1, out=p)
        torch.softmax(logits[rows], -1, dtype=q.dtype, out=q)
        for x in (p, q):
            x.div_(x.sum(-1, keepdim=True))
        g = grad_loss[rows, None].to(q.dtype)
        torch.mul(q.sub_(p), g, out=out[rows])  # (3)
        if grad_loss.stride(0) != 0:
            out[rows].masked_fill_(g == 0, 0.0)  # 0 * NaN would be NaN


def _tilted(target: Teacher, rows: slice, out: Tensor) -> None:
    """Write u of these rows to out."""
    t = target.logits[rows]
    if target.strength is None:
        out.copy_(t)
    else:
        torch.add(t, torch.where(target.mask, target.strength, 0.0).to(out.dtype), out=out)
