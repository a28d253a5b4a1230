"""The fused loss toward a teacher in plain PyTorch: torch_kl_div.py, for two rows of logits.

    u = t, plus G on S if tilted,   P = softmax(u),   q = softmax(z)
    x = u - max u,   y = z - max z,   r = sum e^x,   s = sum e^y                     (1)
    KL     = (sum e^x (x - y)) / r + log s - log r                                   (2)
    dKL/dz = q - P                                                                   (3)

Numerical precision. Neither lse enters the loss: (2) sums x - y, which is 0 where z and u are
equal, and the maxima cancel. P and q go through the same operations in the same order, so that
z = u bit for bit gives a loss and a gradient of exactly 0. Near that point the loss is a difference
of numbers of the size of log s, which leaves an absolute error of about 1e-6 nats.

Hazard: where u is -inf, P is 0 and x - y is infinite or NaN: the product must be left out. On the
CPU, where it costs no wait to look, this is done only if the sum shows such a term.
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
    for rows, (x, y, terms) in tiles(logits, 3):
        z, u = logits[rows], _tilted(target, rows, x)
        top_z, top_u = (v.amax(-1, keepdim=True).to(loss.dtype) for v in (z, u))
        torch.sub(z, top_z, out=y)  # (1)
        torch.sub(u, top_u, out=x)
        torch.sub(x, y, out=terms)
        r, s = (v.exp_().sum(-1, keepdim=True) for v in (x, y))
        total = terms.mul_(x).sum(-1, keepdim=True)
        if z.device.type != "cpu" or not total.isfinite().all():
            total = terms.masked_fill_(x == 0, 0.0).sum(-1, keepdim=True)
        log_r, log_s = r.log(), s.log_()
        loss[rows] = (total / r + (log_s - log_r)).squeeze(-1)  # (2)
        lse[rows] = (top_z + log_s).squeeze(-1)
        norm[rows, 0] = (top_u + log_r).squeeze(-1)
    return loss, lse, norm


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: Teacher, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss (N,) times (3) to out (N, V), which may be the logits themselves. Each
    softmax is divided by its pairwise sum, for the reason that torch_kl_div.py gives."""
    dtype = compute_dtype(logits.dtype)
    for rows, (p, scratch) in tiles(logits, 2):
        q = out[rows] if out.dtype == dtype else scratch
        torch.softmax(_tilted(target, rows, p), -1, dtype=dtype, out=p)
        torch.softmax(logits[rows], -1, dtype=dtype, out=q)
        g = grad_loss[rows, None].to(dtype)
        for v in (p, q):
            v.mul_(g / v.sum(-1, keepdim=True))
        torch.sub(q, p, out=out[rows])  # (3)
        if grad_loss.stride(0) != 0:
            out[rows].masked_fill_(g == 0, 0.0)  # 0 * NaN would be NaN


def _tilted(target: Teacher, rows: slice, out: Tensor) -> Tensor:
    """u of these rows, in `out` if tilted."""
    t = target.logits[rows]
    if target.mask is None or target.strength is None:
        return t
    return torch.add(t, torch.where(target.mask, target.strength, 0.0).to(out.dtype), out=out)
