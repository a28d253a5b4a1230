"""What makes a CPU fast: process settings, and matrix products of few rows.

Results change by rounding at most, and on a GPU nothing changes. The figures are of gpt2-medium,
B = 4, T = 64, on two Zen 4 cores (AVX-512 with bf16, no AMX). `python -m train.benchmark` times a
step with all of this against transformers, without it.
"""

import ctypes
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
SHORT = 64  # T up to which plain attention is faster than the fused one
MAX_ROWS = 16  # 1.7 times as fast as F.linear with 1 row, 1.2 times with 16; more: not measured


def prepare(device: torch.device, length: int) -> None:
    """Set up this process for steps on sequences of `length` tokens; does nothing on a GPU.

    Memory: glibc keeps freed memory. A step of gpt2-medium frees and allocates some 4 GB, and by
    default the kernel maps each large tensor anew, page by page: a quarter of a bfloat16 step.

    Products: at precision "medium", oneDNN multiplies float32 matrices in place of MKL, at 210
    instead of 150 GFLOP/s. It would round them to bfloat16 on AMX, where this is not set.

    Attention: the fused one recomputes the attention weights, (B, H, T, T), in the backward. At
    T = 64 that saves little memory and takes 5 ms per block in bfloat16, plain attention 3.
    """
    if device.type != "cpu":
        return
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    # torch.cpu.get_capabilities() says it too, but not in PyTorch 2.9.
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(length > SHORT)  # despite its name, the CPU's as well


def few_row_products(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which F.linear of up to MAX_ROWS rows uses every core of a CPU.

    Generation multiplies one row per sequence by every weight of the model, 1.4 GB in gpt2-medium,
    so memory bandwidth decides. For one row the BLAS under F.linear uses one core and reads 20 GB/s
    of the 35 that two Zen 4 cores can. Here each weight is cut along its stored rows into one slice
    per core, and the slices are multiplied as a batch, which the cores share: 30 GB/s.

        weight stored (in, out), GPT-2's affine maps:  x W = sum over slices s of x_s W_s
        weight stored (out, in), the LM head:          x W^T = the slices' x W_s^T side by side

    Does nothing on CUDA, or at a float32 precision at which oneDNN multiplies: it uses every core.
    """
    by_blas = torch.get_float32_matmul_precision() == "highest"
    return _FewRows() if device.type == "cpu" and by_blas else nullcontext()


class _FewRows(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and math.prod(args[0].shape[:-1]) <= MAX_ROWS:
            return linear(*args)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in) times the transpose of weight (out, in), plus bias: (..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    (M, n_in), n_out = rows.shape, len(weight)
    if weight.is_contiguous():
        n = torch.get_num_threads()
        whole = n_out // n * n  # 50,257 is odd: the last outputs may not fill a slice
        # bmm, not @, which would see the one matrix that the slices came from
        slices = torch.bmm(weight[:whole].view(n, -1, n_in), rows.T.expand(n, -1, -1))
        y = torch.cat((slices.flatten(0, 1), weight[whole:] @ rows.T)).T  # (M, out)
    else:
        n = math.gcd(n_in, torch.get_num_threads())
        x_slices = rows.view(M, n, -1).transpose(0, 1)  # (n, M, in / n)
        y = torch.bmm(x_slices, weight.T.unflatten(0, (n, -1))).sum(0)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], n_out)
