"""KL(P || softmax(z)) in two short Triton kernels: the lesson before kernels/triton_kl_div.py.

For one row z of V logits, and P = alpha on the target tokens and beta elsewhere,

    lse = log sum e^z
    KL  = sum P log P + lse - sum P z                                                        (1)
    dKL/dz = softmax(z) - P = e^(z - lse) - P                                                (2)

One program per row walks over it in blocks of BLOCK logits. The sum of exponentials would overflow
without the maximum taken out, and the maximum is known only at the end of the row. The online
softmax keeps the maximum m so far and the sum l of e^(z - m), and rescales l whenever m grows:

    m' = max(m, max z),    l' = l e^(m - m') + sum e^(z - m'),    at the end lse = m + log l (3)

The loss is a small difference of sums as large as the logits, so sum P z is also kept relative to
m, as a sum of P (z - m): with d for that and w for the sum of P so far,

    d' = d + w (m - m') + sum P (z - m'),    w' = w + sum P                                  (4)

`impl="triton-simple"` runs it for two-level targets of any size, stride and offset. It is slow
because a program's threads exchange their maxima and sums in every block (see "cross" in
kernels/compile_report.py), and with an odd V no load is wider than one logit.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import TwoLevel

BLOCK = 1024  # logits that a program holds at a time, 8 per thread


@triton.jit(do_not_specialize=list(range(7)))  # one variant for all strides and offsets
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, mask_ptr, levels_ptr,
    loss_ptr, lse_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and lse of the row with the program's number. levels_ptr: TwoLevel.levels."""
    row = tl.program_id(0).to(tl.int64)
    alpha, beta = tl.load(levels_ptr).to(tl.float32), tl.load(levels_ptr + 1).to(tl.float32)
    m, l, d, w = -1e38, 0.0, 0.0, 0.0  # m is finite: -inf - -inf would be NaN
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(logits_ptr + row * stride + column, inside, other=-float("inf")).to(tl.float32)
        target = tl.load(mask_ptr + column, inside, other=0) != 0
        p = tl.where(inside, tl.where(target, alpha, beta), 0.0)
        new_m = tl.maximum(m, tl.max(z, axis=0))
        l = l * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m), axis=0)  # (3)
        terms = tl.where(p == 0.0, 0.0, p * (z - new_m))  # 0 * -inf would be NaN
        d += w * (m - new_m) + tl.sum(terms, axis=0)  # (4)
        w += tl.sum(p, axis=0)
        m = new_m
    log_l = tl.log(l)
    sum_p_log_p = tl.load(levels_ptr + 5).to(tl.float32)
    tl.store(loss_ptr + row, sum_p_log_p + (log_l - d))  # (1); m cancels
    tl.store(lse_ptr + row, m + log_l)


@triton.jit(do_not_specialize=list(range(10)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, mask_ptr, levels_ptr,
    lse_ptr, grad_loss_ptr, grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the row with the program's number, times that of its loss."""
    row = tl.program_id(0).to(tl.int64)
    alpha, beta = tl.load(levels_ptr).to(tl.float32), tl.load(levels_ptr + 1).to(tl.float32)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    length = tl.where(grad_loss == 0, 0, vocab)  # 0 * NaN would be NaN: read nothing
    lse = tl.load(lse_ptr + row, length > 0, other=0.0)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        loaded = column < length
        target = tl.load(mask_ptr + column, loaded, other=0) != 0
        z = tl.load(logits_ptr + row * stride + column, loaded, other=0.0).to(tl.float32)
        grad = grad_loss * (tl.exp(z - lse) - tl.where(target, alpha, beta))  # (2)
        tl.store(out_ptr + row * out_stride + column, grad, inside)


def forward(logits: Tensor, target: TwoLevel) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse and 1 per row, float32 (N,), of logits (N, V) of any row stride."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    lse = torch.empty_like(loss)
    with torch.cuda.device_of(logits):
        forward_kernel[(len(logits),)](*_arguments(logits, target), loss, lse, BLOCK)
    return loss, lse, torch.ones_like(loss)


def backward(
    logits: Tensor, lse: Tensor, _: Tensor, target: TwoLevel, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss (N,) * dKL/d logits into out (N, V), which may be the logits themselves."""
    results = lse, grad_loss, grad_loss.stride(0), out, out.stride(0)
    with torch.cuda.device_of(logits):
        backward_kernel[(len(logits),)](*_arguments(logits, target), *results, BLOCK)


def _arguments(logits: Tensor, target: TwoLevel) -> tuple:
    """The arguments from logits_ptr to levels_ptr, which both kernels take."""
    mask = target.mask.view(torch.uint8)
    return logits, logits.stride(0), logits.shape[1], mask, target.levels
