"""The fused loss in plain PyTorch: the path on the CPU, and on any device without Triton.

    KL     = sum P (log P - log q),   q = softmax(z)                                 (1)
    dKL/dz = |P| q - P,               |P| = sum P, 1 unless a dense P says otherwise (2)

Eager log_softmax + kl_div walks over four to six N x V tensors, each of them fresh memory. Here a
tile of rows, small enough to stay in the cores' caches, goes through every step before the next
one is touched: the logits are read once, the gradient is written once, and the only other buffer
is one tile of scratch in the dtype of the arithmetic (float32; float64 for float64 logits). A
gradient of that dtype is its own scratch, even where it overwrites the logits: ATen's softmax reads
a row for its maximum, then puts each element's exponential where the result goes, so that no
element is written before it has been read for the last time.

Three choices that measurement made, on two Zen 5 cores with float32 tiles at V = 50,257. Both
directions take ATen's softmax of the cached tile, one vectorised kernel, faster than a subtraction
and torch.exp; so the backward has no use for the saved lse. That kernel adds its 50,257 terms in
few accumulators, wrong by up to 1e-5 where they are equal: the forward divides the pairwise sum of
q, 1 if all were exact, by its maximum, 1 / total, to find the total anew. And the gradient's memory
asks for 2 MB pages, because a fresh 51 MB tensor costs 12,566 page faults of 4 KB, which took
longer than the arithmetic: 13 ms, against 3 ms. (In a virtual machine that hands idle pages back to
its host, 2 MB pages freed more than two seconds ago took 60 to 80 ms.)

Guarded. (1) and (2), as everything here, by tests/ that hold both fused paths to float64:

    (1)  test_kl_div_values.py::test_saturated_and_level_logits_are_exact
    (2)  test_kl_div.py::test_loss_and_gradient_are_as_exact_as_the_reference
    |P|  test_kl_div_values.py::test_the_gradient_of_an_unnormalised_target_uses_its_sum

What this does not do: give whole tiles to threads. Each step is parallel inside, so on many cores a
tile is too small to keep all of them busy, and on a machine that shares its cores with other work
every step waits for the slowest thread: seven waits a tile, which made this path slower than the
eager one on two cores under a load of five.
"""

import math
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import compute_dtype
from .target import Target, TwoLevelTarget

TILE_ELEMENTS = 1 << 19  # 2 MB of float32: ten rows of 50,257, in two L2 caches of 1 MB each
HUGE_PAGE = 2 << 20  # bytes


def forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, (N,) each, in the dtype of the arithmetic.

    Args:
        logits: (N, V), last dimension contiguous.
        target: TwoLevelTarget, or probabilities (V,) or (N, V), on the device of the logits.
    """
    loss = logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
    lse = logits.new_empty(len(logits), dtype=loss.dtype)
    for rows, scratch in _tiles(logits):
        z = logits[rows]
        top = z.amax(-1, keepdim=True).to(loss.dtype)
        q = torch.softmax(z, -1, dtype=loss.dtype, out=scratch)
        total = q.sum(-1, keepdim=True).div_(q.amax(-1, keepdim=True))  # of e^(z - top)
        lse[rows] = (top + total.log()).squeeze(-1)
        if isinstance(target, TwoLevelTarget):
            loss[rows] = _two_level_divergence(z, top, total, target, scratch)
        else:
            p = _rows_of(target, rows, loss.dtype)
            log_q = torch.sub(z, top, out=scratch).sub_(total.log())
            # 0 log 0 = 0, and -inf costs nothing where P = 0: both are NaN before the fill.
            terms = torch.sub(p.log(), log_q, out=scratch).mul_(p).masked_fill_(p == 0, 0.0)  # (1)
            loss[rows] = terms.sum(-1)
    return loss, lse


def backward(logits: Tensor, lse: Tensor, target: Target, grad_loss: Tensor, out: Tensor) -> None:
    """Write grad_loss (N,) times (2) to out (N, V), which may be the logits themselves.

    The difference q - P is formed in the dtype of the arithmetic and rounded once, at the store.
    """
    dtype = compute_dtype(logits.dtype)
    two_level = isinstance(target, TwoLevelTarget)
    dense = target.dense(dtype) if isinstance(target, TwoLevelTarget) else target
    for rows, scratch in _tiles(logits):
        q = torch.softmax(
            logits[rows], -1, dtype=dtype, out=out[rows] if out.dtype == dtype else scratch
        )
        p = _rows_of(dense, rows, dtype)
        if not two_level:
            q.mul_(p.sum(-1, keepdim=True))
        torch.mul(q.sub_(p), grad_loss[rows, None].to(dtype), out=out[rows])  # (2)


def _tiles(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive slices of rows, each with its part of one scratch buffer."""
    n, vocab = logits.shape
    step = max(1, min(n, TILE_ELEMENTS // vocab))
    scratch = logits.new_empty(step, vocab, dtype=compute_dtype(logits.dtype))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, scratch[: rows.stop - start]


def _rows_of(p: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """The tile's probabilities, (V,) if all rows share them."""
    return (p if p.ndim == 1 else p[rows]).to(dtype)


def _two_level_divergence(
    z: Tensor, top: Tensor, total: Tensor, target: TwoLevelTarget, scratch: Tensor
) -> Tensor:
    """(1) for a tile, summing P (log(total alpha) - (z - top)): small numbers where q is P."""
    log_ratio = (total * target.alpha).log_()
    members = torch.sub(z.index_select(-1, target.index), top).sub_(log_ratio)
    loss = members.sum(-1).mul_(-target.alpha)
    if target.beta > 0:
        log_ratio.add_(math.log(target.beta / target.alpha))
        others = torch.sub(z, top, out=scratch).sub_(log_ratio).index_fill_(-1, target.index, 0.0)
        loss.sub_(others.sum(-1), alpha=target.beta)
    return loss


def gradient_strides(logits: Tensor) -> tuple[int, int]:
    """Of a gradient whose rows are aligned as the logits' are: contiguous for contiguous logits,
    the same row stride for rows padded to a multiple of 64."""
    vocab = logits.shape[1]
    return vocab + (logits.stride(0) - vocab) % 64, 1


def empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised (N, V) with gradient_strides; on Linux CPUs in 2 MB pages if it is large."""
    n, vocab = logits.shape
    stride, _ = gradient_strides(logits)
    size = n * stride * logits.element_size()
    if logits.device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return logits.new_empty_strided((n, vocab), (stride, 1))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=logits.dtype).view(n, stride)[:, :vocab]
