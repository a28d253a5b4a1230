"""The fused two-level loss in plain PyTorch: for the CPU, and any device without Triton.

    KL     = sum P (log P - log q),   q = softmax(z)                                 (1)
    dKL/dz = q - P                                                                   (2)

Eager log_softmax + kl_div walks over four to six N x V tensors, each of them fresh memory. Here a
tile of rows, small enough to stay in the cores' caches, goes through every step before the next
tile is touched: the logits are read once per direction, the gradient is written once, and the only
other buffers are tiles in the dtype of the arithmetic (float32; float64 for float64 logits).

Numerical precision. ATen's softmax adds its 50,257 terms in as many accumulators as a vector
register holds, which is off by 4.6e-6 with AVX2 (64 rows of N(0, 9) on a Zen 5). So the forward
sums e^(z - max) with torch.sum, which is pairwise. Its lse, near -70 in float32, is rounded by up
to 4e-6, and an absolute error in lse becomes a relative error in the gradient. So the backward does
not read it: it takes ATen's softmax, whose e^(z - max) is accurate, and divides each row by its
pairwise sum. The gradient's error is then 1e-7 relative (norm), whatever the level of the logits
and the number of accumulators.

Speed. Each step of a tile is one ATen call, parallel inside, and ends at a barrier of all threads:
on many cores a tile is too small to keep all of them busy. A gradient in the dtype of the
arithmetic is its own scratch, even where it overwrites the logits: ATen's softmax reads a row for
its maximum, then puts each element's exponential where the result goes, so no element is written
before its last read. The gradient's memory asks for 2 MB pages: in pages of 4 KB, a fresh tensor of
51 MB costs 12,566 page faults.
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from .reference import compute_dtype
from .target import TwoLevel

CPU_TILE = 1 << 19  # elements, 2 MB of float32: ten rows of 50,257, in two L2 caches of 1 MB each
GPU_TILE = 1 << 25  # 128 MB of float32: enough elements per launch for any GPU
HUGE_PAGE = 2 << 20  # bytes


def forward(logits: Tensor, target: TwoLevel) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp and 1 per row, (N,) each, in the dtype of the arithmetic."""
    loss = logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
    lse = torch.empty_like(loss)
    for rows, (scratch,) in tiles(logits, 1):
        z = logits[rows]
        top = z.amax(-1, keepdim=True).to(loss.dtype)
        log_total = torch.sub(z, top, out=scratch).exp_().sum(-1, keepdim=True).log_()
        lse[rows] = (top + log_total).squeeze(-1)
        loss[rows] = _divergence(z, top, log_total, target, scratch)
    return loss, lse, torch.ones_like(loss)


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: TwoLevel, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss (N,) times (2) to out (N, V), which may be the logits themselves. It is
    formed in the dtype of the arithmetic and rounded once, at the store."""
    dtype = compute_dtype(logits.dtype)
    p = torch.where(target.mask, target.levels[0], target.levels[1]).to(dtype)  # (V,)
    one_g = grad_loss.stride(0) == 0  # then g P is one row
    for rows, (scratch,) in tiles(logits, 1):
        q = out[rows] if out.dtype == dtype else scratch
        torch.softmax(logits[rows], -1, dtype=dtype, out=q)
        g = (grad_loss[:1] if one_g else grad_loss[rows]).to(dtype).unsqueeze(-1)
        torch.addcmul(p * -g, q, g / q.sum(-1, keepdim=True), out=out[rows])  # (2)
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


def _divergence(
    z: Tensor, top: Tensor, log_total: Tensor, target: TwoLevel, scratch: Tensor
) -> Tensor:
    """(1) for a tile, summing P (log P + log total - (z - top)): small numbers where q is P."""
    alpha, beta, _, log_alpha, log_beta, _ = target.levels
    wanted = torch.sub(z.index_select(-1, target.ids), top).sub_(log_total + log_alpha)
    loss = wanted.sum(-1).mul_(-alpha)
    if target.has_beta:
        others = torch.sub(z, top, out=scratch).sub_(log_total + log_beta)
        loss -= others.index_fill_(-1, target.ids, 0.0).sum(-1).mul_(beta)
    return loss


def gradient_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of a gradient whose rows are aligned as the logits' are: contiguous for contiguous
    logits, the same row stride for rows padded to a multiple of 64."""
    vocab = logits.shape[1]
    return vocab + (logits.stride(0) - vocab) % 64, 1


def empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised (N, V) with gradient_strides and zeros between its rows, which a product that
    is handed the gradient may read; on Linux CPUs in 2 MB pages if it is large."""
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
