"""The host's side of kernels/triton_kl_div.py: what is allocated, checked and passed at a launch.

The kernels are launched with one program a row. A gradient that lies out of step with the logits'
16-byte boundaries is written to a buffer in step and copied; a dense P out of step is read by
scalars.
"""

import torch
from torch import Tensor

from . import membership, triton_kl_div
from .target import Target, TwoLevelTarget


def forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The divergence and log-sum-exp of each row, in nats.

    Args:
        logits: (N, V), float32, bfloat16 or float16; last dimension contiguous, any row stride.
        target: a TwoLevelTarget, or probabilities (V,) or (N, V), on the device of the logits.

    Returns:
        loss, lse: float32 (N,).
    """
    rows = len(logits)
    loss = logits.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    if rows == 0:
        return loss, lse
    arguments, constants = _arguments(logits, target)
    if isinstance(target, TwoLevelTarget):
        sum_p_log_p, beta = target.sum_p_log_p, target.beta > 0
    else:
        sum_p_log_p, beta = 0.0, False
    with torch.cuda.device_of(logits):
        triton_kl_div.forward_kernel[(rows,)](
            *arguments, sum_p_log_p, loss, lse, BETA=beta, **constants
        )
    return loss, lse


def backward(logits: Tensor, lse: Tensor, target: Target, grad_loss: Tensor, out: Tensor) -> None:
    """Write grad_loss * dKL/d logits into out.

    Args:
        logits, target: as in forward. lse: float32 (N,), from forward.
        grad_loss: float32 (N,), any stride.
        out: (N, V), dtype of the logits, any row stride; may be the logits themselves.
    """
    rows, vocab = logits.shape
    assert out.dtype == logits.dtype, (out.dtype, logits.dtype)
    if rows == 0:
        return
    vec = 16 // logits.element_size()
    if _phase(out, vec) != _phase(logits, vec):  # one of the two would cross its boundaries
        buffer = logits.new_empty((rows - 1) * logits.stride(0) + vocab + vec)
        in_phase = buffer.as_strided(logits.shape, logits.stride(), _phase(logits, vec)[0])
        backward(logits, lse, target, grad_loss, in_phase)
        out.copy_(in_phase)
        return
    arguments, constants = _arguments(logits, target)
    sum_p = lse  # of a two-level target it is 1, and not read
    if isinstance(target, Tensor):
        sum_p = target.sum(-1, dtype=torch.float32).expand(rows).contiguous()
    with torch.cuda.device_of(logits):
        triton_kl_div.backward_kernel[(rows,)](
            *arguments, sum_p, lse, grad_loss, grad_loss.stride(0), out, out.stride(0), **constants
        )


def _phase(x: Tensor, step: int) -> tuple[int, int]:
    """How far past a multiple of `step` elements the first row starts, and each next row."""
    stride = x.stride(0) if x.ndim == 2 and x.shape[0] > 1 else 0
    return x.data_ptr() // x.element_size() % step, stride % step


def meta(dtype: torch.dtype, dense: bool, p_align: int = 16, warp_size: int = 32) -> dict[str, int]:
    """Both kernels' constants and warps, for the launch and for kernels/compile_report.py."""
    return {
        "DENSE": dense,
        "P_ALIGN": p_align,
        "VEC": 16 // dtype.itemsize,
        "num_warps": membership.LANES // warp_size,
    }


def _arguments(logits: Tensor, target: Target) -> tuple[tuple, dict[str, int]]:
    """What both kernels take: the arguments from logits_ptr to ratio, and the constants."""
    vec = 16 // logits.element_size()
    warp_size = 64 if torch.version.hip else 32
    rows = logits, logits.stride(0), logits.shape[1]
    if isinstance(target, TwoLevelTarget):
        words = membership.membership_words(target.mask, vec)
        members = target.mask.view(torch.uint8)
        arguments = (*rows, words, 0, members, target.alpha, target.beta / target.alpha)
        return arguments, meta(logits.dtype, dense=False, warp_size=warp_size)
    if target.dtype == torch.float64 or target.stride(-1) != 1:
        target = target.to(torch.float32).contiguous()
    p_align = min(16, vec * target.element_size())
    step = p_align // target.element_size()
    if _phase(target, step) != _phase(logits, step):
        p_align = target.element_size()
    stride = target.stride(0) if target.ndim == 2 else 0
    arguments = (*rows, target, stride, target, 1.0, 0.0)
    return arguments, meta(logits.dtype, True, p_align, warp_size)
