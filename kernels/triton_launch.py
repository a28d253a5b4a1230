"""Launch the kernels of triton_kl_div.py and triton_teacher.py: allocation, alignment, arguments.

One program per row. A gradient of another 16-byte alignment than the logits' is written to a
buffer of theirs and copied. A (V,) P of another alignment is copied once for each alignment of a
row; an (N, V) P is read element by element.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import bitmask, triton_kl_div, triton_teacher
from .target import Target, TeacherTarget, TwoLevelTarget

# Left to itself, ptxas saves registers by sinking loads below arithmetic, so that a warp waits for
# DRAM two to four times per tile; with these it waits once (kernels/compile_report.py).
MAX_REGISTERS = 64
MAX_REGISTERS_BY_ELEMENT = 96  # of a forward that reads P element by element: 16 more loads
MAX_REGISTERS_TEACHER = 80
MAX_REGISTERS_SHIFTED = 104  # of a teacher whose vectors lie in two blocks; sm_86 spills at 96


def forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and lse per row in nats, float32 (N,); and norm, float32: (N,), (8) of
    kernels/triton_kl_div.py, or for a teacher (N, 3), (7) of kernels/triton_teacher.py. Logits are
    float32, bfloat16 or float16, a teacher's of any of these, with any row stride."""
    rows = len(logits)
    loss = logits.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    norm = loss.new_empty((rows, 3) if isinstance(target, TeacherTarget) else rows)
    if rows:
        kernels, arguments, constants = _arguments(logits, target, "forward")
        with torch.cuda.device_of(logits):
            kernels.forward_kernel[(rows,)](*arguments, loss, lse, norm, **constants)
    return loss, lse, norm


def backward(
    logits: Tensor, lse: Tensor, norm: Tensor, target: Target, grad_loss: Tensor, out: Tensor
) -> None:
    """Write grad_loss, float32 (N,) of any stride, times dKL/d logits into out, of their shape and
    dtype and any row stride, which may be the logits themselves. lse, norm: from forward."""
    rows = len(logits)
    if rows == 0:
        return
    kernels, arguments, constants = _arguments(logits, target, "backward")
    aligned = _aligned_like(logits, out)
    upstream = grad_loss, grad_loss.stride(0)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(rows,)](
            *arguments, lse, norm, *upstream, aligned, aligned.stride(0), **constants
        )
    if aligned is not out:
        out.copy_(aligned)


def _aligned_like(logits: Tensor, out: Tensor) -> Tensor:
    """out, or a buffer of its shape if its rows have another 16-byte alignment than the logits'."""
    vec = 16 // logits.element_size()
    if _misalignment(out, vec) == _misalignment(logits, vec):
        return out
    rows, vocab = logits.shape
    buffer = logits.new_empty((rows - 1) * logits.stride(0) + vocab + vec)
    return buffer.as_strided(logits.shape, logits.stride(), _misalignment(logits, vec)[0])


def _misalignment(x: Tensor, step: int) -> tuple[int, int]:
    """How far past a multiple of `step` elements the first row starts, and each next row."""
    stride = x.stride(0) if x.ndim == 2 and x.shape[0] > 1 else 0
    return x.data_ptr() // x.element_size() % step, stride % step


@lru_cache
def _current_gpu() -> GPUTarget | None:
    """The GPU to compile for; None in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target()


def meta(
    dtype: torch.dtype, gpu: GPUTarget | None, kernel: str, **constants: Any
) -> dict[str, Any]:
    """Constants and options of a kernel, for the launch and for kernels/compile_report.py."""
    nvidia = gpu is not None and gpu.backend == "cuda"
    registers = MAX_REGISTERS
    if "SHIFT" in constants:  # for a teacher
        registers = MAX_REGISTERS_SHIFTED if constants["SHIFT"] else MAX_REGISTERS_TEACHER
    elif kernel == "forward":
        constants["PTX"] = nvidia
        if constants["P_ALIGN"] <= 4:
            registers = MAX_REGISTERS_BY_ELEMENT
    warp_size = gpu.warp_size if gpu else 32
    constants |= {"VEC": 16 // dtype.itemsize, "num_warps": bitmask.THREADS // warp_size}
    return constants | ({"maxnreg": registers} if nvidia else {})


def _arguments(
    logits: Tensor, target: Target, kernel: str
) -> tuple[ModuleType, tuple, dict[str, Any]]:
    """The kernels for this target, their arguments before the results of forward, constants."""
    rows = logits, logits.stride(0), logits.shape[1]
    if isinstance(target, TeacherTarget):
        arguments, constants = _teacher_arguments(logits, target)
        constants = meta(logits.dtype, _current_gpu(), kernel, **constants)
        return triton_teacher, (*rows, *arguments), constants
    vec, p_align, beta, sum_p_log_p = 16 // logits.element_size(), 16, 0.0, 0.0
    if isinstance(target, TwoLevelTarget):
        mask, bits = target.mask.view(torch.uint8), target.bitmasks[vec]
        beta, sum_p_log_p = target.beta, target.sum_p_log_p
        arguments = bits, 0, bits.stride(0), mask, target.alpha, beta / target.alpha
    else:
        p, stride, step, p_align = _aligned_p(logits, target)
        arguments = p, stride, step, p, 1.0, 0.0
    constants = {"DENSE": isinstance(target, Tensor), "P_ALIGN": p_align}
    if kernel == "forward":
        arguments += (sum_p_log_p,)
        constants["BETA"] = beta > 0
    constants = meta(logits.dtype, _current_gpu(), kernel, **constants)
    return triton_kl_div, (*rows, *arguments), constants


def _aligned_p(logits: Tensor, p: Tensor) -> tuple[Tensor, int, int, int]:
    """P, target_stride and target_step of kernels/triton_kl_div.py, and P_ALIGN."""
    vec = 16 // logits.element_size()
    if p.dtype == torch.float64 or p.stride(-1) != 1:
        p = p.to(torch.float32).contiguous()
    stride, p_align = p.stride(0) if p.ndim == 2 else 0, min(16, vec * p.element_size())
    elements = p_align // p.element_size()
    if _misalignment(p, elements) == _misalignment(logits, elements):
        return p, stride, 1, p_align
    if p.ndim == 2:
        return p, stride, 1, p.element_size()
    p = bitmask.shifted_copies(p, vec, -(-logits.shape[1] // 8) * 8)
    return p, 0, p.stride(0), p_align


def _teacher_arguments(logits: Tensor, target: TeacherTarget) -> tuple[tuple, dict[str, Any]]:
    """The arguments of kernels/triton_teacher.py from teacher_ptr to strength, and constants."""
    assert target.logits is not None
    t, vec, kind = target.logits, 16 // logits.element_size(), "none"
    bias, step, edge, strength = logits, 0, logits, 0.0  # none: not read
    if target.bias is not None:
        kind, bias, strength = "vector", target.bias.tables[vec], target.bias.strength
        step, edge = bias.stride(0), bias
        if target.bias.mask is not None:
            kind, edge = "bits", target.bias.mask.view(torch.uint8)
    shift, t_align = False, min(16, vec * t.element_size())
    elements = t_align // t.element_size()
    if _misalignment(t, elements) != _misalignment(logits, elements):
        shift = t.element_size() == logits.element_size() and kind != "vector"
        t_align = t.element_size()
    constants = {"BIAS": kind, "SHIFT": shift, "T_ALIGN": t_align}
    return (t, t.stride(0), bias, step, edge, strength), constants
