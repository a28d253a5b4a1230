"""Everything that exists to make a CPU fast: process settings, and products of few rows.

None of it changes results beyond rounding, and on a GPU it does nothing. Measured on two Zen 4
cores (AVX-512 with bf16, no AMX) with gpt2-medium, B = 4, T = 64; `python -m train.benchmark` times
a step with all of it against one without.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
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

    Memory: glibc keeps what is freed. A step of gpt2-medium frees and allocates some 4 GB, and by
    default each large tensor is mapped anew, page by page: a quarter of a bfloat16 step.

    Products: the precision "medium" lets oneDNN multiply float32 in place of MKL, 210 GFLOP/s
    instead of 150. Only with AMX would it round to bfloat16 first; without, it stays float32.

    Attention: the fused one saves the memory of the weights, (B, H, T, T), little at T = 64, and
    computes them again in the backward: 5 ms per block in bfloat16, where plain attention took 3.
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

    Generation multiplies one row per sequence by every weight of the model, 1.4 GB in gpt2-medium:
    memory bandwidth is what counts. The BLAS under F.linear takes one core for one row; on two
    Zen 4 cores that read 35 GB/s it read 20. Here a weight, cut along the rows in which it is
    stored into one slice per core, is a batch of smaller matrices, which the cores share: 30 GB/s.

        weight stored (in, out), GPT-2's affine maps:  x W = sum over slices s of x_s W_s
        weight stored (out, in), the LM head:          x W^T = the slices' x W_s^T side by side

    Nothing changes on CUDA, nor at a float32 precision that lets oneDNN multiply, which uses every
    core by itself.
    """
    by_blas = torch.get_float32_matmul_precision() == "highest"
    return _FewRows() if device.type == "cpu" and by_blas else nullcontext()


class _FewRows(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
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
