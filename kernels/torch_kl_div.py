"""The fused losses in plain PyTorch: for the CPU, and any device without Triton.

    KL     = sum P (log P - log q),   q = softmax(z)                                 (1)
    dKL/dz = q - P                                                                   (2)

Toward a teacher, P = softmax(u), u = t, plus G on S if tilted:

    x = u - max u,   y = z - max z,   r = sum e^x,   s = sum e^y                     (3)
    KL     = (sum e^x (x - y)) / r + log s - log r                                   (4)

Eager log_softmax + kl_div walks over four to six N x V tensors, each of them fresh memory. Here a
tile of rows, small enough to stay in the cores' caches, goes through every step before the next
tile is touched: the logits are read once per direction, the gradient is written once, and the only
other buffers are tiles in the dtype of the arithmetic (float32; float64 for float64 logits).

Numerical precision. ATen's softmax adds its 50,257 terms in as many accumulators as a vector
register holds, which is off by 4.6e-6 with AVX2 (64 rows of N(0, 9) on a Zen 5). So the forward
sums e^(z - max) with torch.sum, which is pairwise. Its lse, near -70 in float32, is rounded by up
to 4e-6, which would be a relative error of the gradient. So the backward does not read it: it takes
ATen's softmax, whose e^(z - max) is accurate, and divides each row by its pairwise sum. The
gradient's error is then 1e-7 relative (norm), whatever the logits' level and the accumulators.

Toward a teacher, neither lse enters the loss: (4) sums x - y, which is 0 where z and u are equal,
and the maxima cancel. P and q go through the same operations in the same order, so that z = u bit
for bit gives a loss and a gradient of exactly 0. Near that point the loss is a difference of
numbers of the size of log s, which leaves an absolute error of about 1e-6 nats.

Hazard: where u is -inf, P is 0 and x - y is infinite or NaN: the product must be left out. On the
CPU, where it costs no wait to look, this is done only if the sum shows such a term.

Speed. Each step of a tile is one ATen call, parallel inside, and ends at a barrier of all threads:
on many cores a tile is too small to keep all of them busy. A gradient in the dtype of the
arithmetic is its own scratch, even over the logits: ATen's softmax reads a row for its maximum,
then writes each exponential where it has read. The gradient's memory asks for 2 MB pages: in pages
of 4 KB, a fresh tensor of 51 MB costs 12,566 page faults.
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from .reference import compute_dtype
from .target import Parts, Teacher, TwoLevel

CPU_TILE = 1 << 19  # elements, 2 MB of float32: ten rows of 50,257, in two L2 caches of 1 MB each
GPU_TILE = 1 << 25  # 128 MB of float32: enough elements per launch for any GPU
HUGE_PAGE = 2 << 20  # bytes


def forward(logits: Tensor, target: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp per row, (N,) each, in the dtype of the arithmetic; and ones in place of
    the norm that the Triton kernels have."""
    n, is_teacher = len(logits), isinstance(target, Teacher)
    loss = logits.new_empty(n, dtype=compute_dtype(logits.dtype))
    lse, norm = torch.empty_like(loss), loss.new_ones((n, 3) if is_teacher else n)
    for rows, scratch in tiles(logits, 3 if is_teacher else 1):
        z = logits[rows]
        top = z.amax(-1, keepdim=True).to(loss.dtype)
        if isinstance(target, Teacher):
            loss[rows], log_total = _from_teacher(z, top, target, rows, scratch)
        else:
            loss[rows], log_total = _from_levels(z, top, target, scratch[0])
        lse[rows] = (top + log_total).squeeze(-1)
    return loss, lse, norm


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: Parts, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss (N,) times (2) to out (N, V), which may be the logits themselves; rounded
    once, at the store. Where a row's own grad_loss is 0, so is the gradient, whatever is in the
    row; one that all rows share (stride 0) is not looked at, and 0 * NaN is NaN."""
    dtype, is_teacher = compute_dtype(logits.dtype), isinstance(target, Teacher)
    one_g = grad_loss.stride(0) == 0  # then g P of a two-level target is one row
    if isinstance(target, TwoLevel):
        levels = torch.where(target.mask, target.levels[0], target.levels[1]).to(dtype)  # (V,)
    for rows, scratch in tiles(logits, 2 if is_teacher else 1):
        q = out[rows] if out.dtype == dtype else scratch[0]
        torch.softmax(logits[rows], -1, dtype=dtype, out=q)
        g = (grad_loss[:1] if one_g else grad_loss[rows]).to(dtype).unsqueeze(-1)
        if isinstance(target, TwoLevel):
            torch.addcmul(levels * -g, q, g / q.sum(-1, keepdim=True), out=out[rows])  # (2)
        else:
            p = torch.softmax(_tilted(target, rows, scratch[1]), -1, dtype=dtype, out=scratch[1])
            for v in (p, q):
                v.mul_(g / v.sum(-1, keepdim=True))
            torch.sub(q, p, out=out[rows])  # (2)
        if not one_g:
            out[rows].masked_fill_(g == 0, 0.0)  # 0 * NaN would be NaN


def tiles(logits: Tensor, buffers: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield consecutive slices of rows, each with its part of as many scratch buffers."""
    n, vocab = logits.shape
    elements = CPU_TILE if logits.device.type == "cpu" else GPU_TILE
    step = max(1, min(n, elements // vocab))
    scratch = logits.new_empty(buffers, step, vocab, dtype=compute_dtype(logits.dtype))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, scratch[:, : rows.stop - start]


def _from_levels(
    z: Tensor, top: Tensor, target: TwoLevel, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """(1) for a tile, and log sum e^(z - top), summing P (log P + that - (z - top)): small numbers
    where q is P."""
    log_total = torch.sub(z, top, out=scratch).exp_().sum(-1, keepdim=True).log_()
    alpha, _, _, log_alpha, log_beta, _ = target.levels
    wanted = torch.sub(z.index_select(-1, target.ids), top).sub_(log_total + log_alpha)
    loss = wanted.sum(-1).mul_(-alpha)
    if target.beta is not None:
        others = torch.sub(z, top, out=scratch).sub_(log_total + log_beta)
        loss -= others.index_fill_(-1, target.ids, 0.0).sum(-1).mul_(target.beta)
    return loss, log_total


def _from_teacher(
    z: Tensor, top: Tensor, target: Teacher, rows: slice, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """(4) for a tile, and log s."""
    x, y, terms = scratch
    u = _tilted(target, rows, x)
    torch.sub(z, top, out=y)  # (3)
    torch.sub(u, u.amax(-1, keepdim=True).to(x.dtype), out=x)
    torch.sub(x, y, out=terms)
    r, s = (v.exp_().sum(-1, keepdim=True) for v in (x, y))
    total = terms.mul_(x).sum(-1, keepdim=True)
    if z.device.type != "cpu" or not total.isfinite().all():
        total = terms.masked_fill_(x == 0, 0.0).sum(-1, keepdim=True)
    log_s = s.log_()
    return (total / r + (log_s - r.log_())).squeeze(-1), log_s


def _tilted(target: Teacher, rows: slice, out: Tensor) -> Tensor:
    """u of these rows, in `out` if tilted."""
    t = target.logits[rows]
    if target.mask is None or target.strength is None:
        return t
    return torch.add(t, torch.where(target.mask, target.strength, 0.0).to(out.dtype), out=out)


def gradient_strides(logits: Tensor) -> tuple[int, int]:
    """Strides that align rows as the logits' are: contiguous for contiguous logits, the same row
    stride for rows padded to a multiple of 64."""
    vocab = logits.shape[1]
    return vocab + (logits.stride(0) - vocab) % 64, 1


def empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised (N, V) with gradient_strides and zeros between its rows, as zero_padded has
    them; on Linux CPUs in 2 MB pages if it is large."""
    n, vocab = logits.shape
    stride, _ = gradient_strides(logits)
    size = n * stride * logits.element_size()
    if logits.device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return zero_padded(logits.new_empty(n, stride), vocab)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zeros
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=logits.dtype).view(n, stride)[:, :vocab]


def zero_padded(buffer: Tensor, vocab: int) -> Tensor:
    """The first `vocab` columns of a buffer, after zeroing the others: oneDNN's AMX products read
    what lies between rows, and 0 * NaN is NaN."""
    buffer[:, vocab:] = 0.0
    return buffer[:, :vocab]
