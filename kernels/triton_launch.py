"""Launch kernels/triton_kl_div.py: one program per row; allocation, alignment and arguments.

A gradient of another 16-byte alignment than the logits' is written to a buffer of theirs and
copied. A (V,) P of another alignment is copied once for each alignment of a row; an (N, V) P is
read element by element.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import bitmask, triton_kl_div
from .target import Probabilities, TwoLevelTarget

# Left to itself, ptxas saves registers by sinking loads below arithmetic, so that a warp waits for
# DRAM two to four times per tile; with 64 it waits once (kernels/compile_report.py).
MAX_REGISTERS = 64
MAX_REGISTERS_BY_ELEMENT = 96  # of a forward that reads P element by element: 16 more loads


def forward(logits: Tensor, target: Probabilities) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each row in nats, and what the backward needs of it.

    Args:
        logits: (N, V), float32, bfloat16 or float16; last dimension contiguous, any row stride.
        target: a TwoLevelTarget, or probabilities (V,) or (N, V), on the device of the logits.

    Returns:
        loss, lse, norm: float32 (N,); norm: (8) of kernels/triton_kl_div.py.
    """
    rows = len(logits)
    loss = logits.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    norm = torch.empty_like(loss)
    if rows == 0:
        return loss, lse, norm
    sum_p_log_p, beta = 0.0, 0.0
    if isinstance(target, TwoLevelTarget):
        sum_p_log_p, beta = target.sum_p_log_p, target.beta
    arguments, constants = _arguments(logits, target, "forward")
    gpu = current_gpu()
    with torch.cuda.device_of(logits):
        triton_kl_div.forward_kernel[(rows,)](
            *arguments,
            sum_p_log_p,
            loss,
            lse,
            norm,
            BETA=beta > 0,
            PTX=gpu is not None and gpu.backend == "cuda",
            **constants,
        )
    return loss, lse, norm


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: Probabilities, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss * dKL/d logits into out.

    Args:
        logits, target: as in forward. lse, norm: from forward.
        grad_loss: float32 (N,), any stride.
        out: (N, V), dtype of the logits, any row stride; may be the logits themselves.
    """
    rows = len(logits)
    assert out.dtype == logits.dtype, (out.dtype, logits.dtype)
    if rows == 0:
        return
    arguments, constants = _arguments(logits, target, "backward")
    aligned = aligned_like(logits, out)
    upstream = grad_loss, grad_loss.stride(0)
    with torch.cuda.device_of(logits):
        triton_kl_div.backward_kernel[(rows,)](
            *arguments, lse, norm, *upstream, aligned, aligned.stride(0), **constants
        )
    if aligned is not out:
        out.copy_(aligned)


def aligned_like(logits: Tensor, out: Tensor) -> Tensor:
    """out, or a buffer of its shape if its rows have another 16-byte alignment than the logits'."""
    vec = 16 // logits.element_size()
    if misalignment(out, vec) == misalignment(logits, vec):
        return out
    rows, vocab = logits.shape
    buffer = logits.new_empty((rows - 1) * logits.stride(0) + vocab + vec)
    return buffer.as_strided(logits.shape, logits.stride(), misalignment(logits, vec)[0])


def misalignment(x: Tensor, step: int) -> tuple[int, int]:
    """How far past a multiple of `step` elements the first row starts, and each next row."""
    stride = x.stride(0) if x.ndim == 2 and x.shape[0] > 1 else 0
    return x.data_ptr() // x.element_size() % step, stride % step


@lru_cache
def current_gpu() -> GPUTarget | None:
    """The GPU to compile for; None in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target()


def meta(
    dtype: torch.dtype, gpu: GPUTarget | None, kernel: str, dense: bool, p_align: int = 16
) -> dict[str, int]:
    """Constants and options of a kernel, for the launch and for kernels/compile_report.py."""
    constants = {"DENSE": dense, "P_ALIGN": p_align, "VEC": 16 // dtype.itemsize}
    constants["num_warps"] = bitmask.THREADS // (gpu.warp_size if gpu else 32)
    if gpu and gpu.backend == "cuda":
        more = kernel == "forward" and dense and p_align <= 4
        constants["maxnreg"] = MAX_REGISTERS_BY_ELEMENT if more else MAX_REGISTERS
    return constants


def _arguments(logits: Tensor, target: Probabilities, kernel: str) -> tuple[tuple, dict[str, int]]:
    """The arguments from logits_ptr to ratio, and the constants, which both kernels take."""
    vocab, vec = logits.shape[1], 16 // logits.element_size()
    rows = logits, logits.stride(0), vocab
    if isinstance(target, TwoLevelTarget):
        mask = target.mask.view(torch.uint8)
        bits = target.bitmasks[vec]
        arguments = (*rows, bits, 0, bits.stride(0), mask, target.alpha, target.beta / target.alpha)
        return arguments, meta(logits.dtype, current_gpu(), kernel, dense=False)
    if target.dtype == torch.float64 or target.stride(-1) != 1:
        target = target.to(torch.float32).contiguous()
    p_align = min(16, vec * target.element_size())
    stride, step = (target.stride(0) if target.ndim == 2 else 0), 1
    aligned_to = p_align // target.element_size()
    if misalignment(target, aligned_to) != misalignment(logits, aligned_to):
        if target.ndim == 1:
            target = bitmask.shifted_copies(target, vec, -(-vocab // 8) * 8)
            step = target.stride(0)
        else:
            p_align = target.element_size()
    arguments = (*rows, target, stride, step, target, 1.0, 0.0)
    return arguments, meta(logits.dtype, current_gpu(), kernel, True, p_align)
