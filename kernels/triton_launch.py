"""Launch the kernels of triton_kl_div.py and triton_teacher.py: allocation, alignment, arguments.

One program per row; a launch without programs does nothing.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import bitmask, triton_kl_div, triton_teacher
from .target import Teacher, TwoLevel

# Left to itself, ptxas saves registers by sinking loads below arithmetic, so that a warp waits for
# DRAM two to four times per tile; with these once, rarely twice (kernels/compile_report.py).
MAX_REGISTERS = 64
MAX_REGISTERS_BETA = 72  # of a float32 forward with beta > 0, which Triton 3.5 and 3.6 spill at 64
MAX_REGISTERS_TEACHER = 80
MAX_REGISTERS_BY_ELEMENT = 104  # of a teacher that is read element by element: 16 more loads

SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024  # elements of a program at a time; programs of a launch


def forward(logits: Tensor, target: TwoLevel | Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and lse per row in nats, float32 (N,); and norm, float32: (N,), (8) of
    kernels/triton_kl_div.py, or for a teacher (N, 3), (7) of kernels/triton_teacher.py. Logits are
    float32, bfloat16 or float16, a teacher's of any dtype, with any row stride."""
    rows = len(logits)
    loss = logits.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    norm = loss.new_empty((rows, 3) if isinstance(target, Teacher) else rows)
    kernels, arguments, constants = _arguments(logits, target)
    if isinstance(target, TwoLevel):
        constants = meta(logits.dtype, _current_gpu(), BETA=target.beta is not None)
    with torch.cuda.device_of(logits):
        kernels.forward_kernel[(rows,)](*arguments, loss, lse, norm, **constants)
    return loss, lse, norm


def backward(
    logits: Tensor,
    lse: Tensor,
    norm: Tensor,
    target: TwoLevel | Teacher,
    grad_loss: Tensor,
    out: Tensor,
) -> None:
    """Write grad_loss, float32 (N,) of any stride, times dKL/d logits into out, of their shape and
    dtype and any row stride, which may be the logits themselves. lse, norm: from forward."""
    if not _in_step(out, logits, 16 // logits.element_size()):
        logits = out.copy_(logits)  # vectors are stored where vectors are loaded
    kernels, arguments, constants = _arguments(logits, target)
    results = lse, norm, grad_loss, grad_loss.stride(0), out, out.stride(0)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(len(logits),)](*arguments, *results, **constants)


def _in_step(x: Tensor, logits: Tensor, vec: int) -> bool:
    """Whether each row of x starts as many elements past a multiple of `vec` as the logits'."""
    first = x.data_ptr() // x.element_size() - logits.data_ptr() // logits.element_size()
    return first % vec == 0 and (len(x) < 2 or (x.stride(0) - logits.stride(0)) % vec == 0)


@lru_cache
def _current_gpu() -> GPUTarget | None:
    """The GPU to compile for; None in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target()


def meta(dtype: torch.dtype, gpu: GPUTarget | None, **constants: Any) -> dict[str, Any]:
    """Constants and options of a kernel, for the launch and for kernels/compile_report.py."""
    registers = MAX_REGISTERS
    if "T_ALIGN" in constants:
        by_vector = constants["T_ALIGN"] > 4
        registers = MAX_REGISTERS_TEACHER if by_vector else MAX_REGISTERS_BY_ELEMENT
    elif constants.get("BETA") and dtype == torch.float32:
        registers = MAX_REGISTERS_BETA
    warp_size = gpu.warp_size if gpu else 32
    constants |= {"VEC": 16 // dtype.itemsize, "num_warps": bitmask.THREADS // warp_size}
    return constants | ({"maxnreg": registers} if gpu and gpu.backend == "cuda" else {})


def _arguments(
    logits: Tensor, target: TwoLevel | Teacher
) -> tuple[ModuleType, tuple, dict[str, Any]]:
    """The kernels for this target, their arguments before the results of forward, constants."""
    rows, vec = (logits, logits.stride(0), logits.shape[1]), 16 // logits.element_size()
    tokens: tuple[Any, ...] = logits, logits, 0  # without a tilt: not read
    if target.mask is not None and target.bitmasks is not None:
        table = target.bitmasks[vec - 4 :]
        tokens = target.mask.view(torch.uint8), table, table.stride(0)
    if isinstance(target, TwoLevel):
        constants = meta(logits.dtype, _current_gpu())
        return triton_kl_div, (*rows, *tokens, target.levels), constants
    t, tilt = target.logits, target.strength is not None
    t_align = min(16, vec * t.element_size())
    if not _in_step(t, logits, t_align // t.element_size()):
        t_align = t.element_size()
    constants = meta(logits.dtype, _current_gpu(), TILT=tilt, T_ALIGN=t_align)
    strength = target.strength if tilt else logits
    return triton_teacher, (*rows, t, t.stride(0), *tokens, strength), constants


@triton.jit(do_not_specialize=list(range(4)))
def scale_kernel(x_ptr, size: tl.int64, factor_ptr, step: tl.int64, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x times the factor, in place, for x_ptr: (size,); nothing is read or written if that is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, at < size).to(tl.float32)
            tl.store(x_ptr + at, x * factor, at < size)


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply contiguous x by factor (), without a wait for its value."""
    programs = min(SCALE_PROGRAMS, triton.cdiv(x.numel(), SCALE_BLOCK))
    with torch.cuda.device_of(x):
        scale_kernel[(programs,)](x, x.numel(), factor, programs * SCALE_BLOCK, SCALE_BLOCK)
