"""What the machine is told so that a training step is fast, and no result is another for it.

Measured on two Zen 4 cores (AVX-512 with bf16, no AMX), gpt2-medium, B = 4, T = 64: see
`python -m train.benchmark`, which times a step with all of this against one without.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
SHORT = 64  # T up to which plain attention is the faster one on a CPU


def prepare(device: torch.device, dtype: str) -> None:
    """Set what holds for the whole process, once, before the first step.

    Args:
        device: where the steps run.
        dtype: "float32", "bfloat16", or "tf32" for float32 products that CUDA rounds to TF32.

    Raises:
        ValueError: TF32 on another device than CUDA.
    """
    if dtype == "tf32":
        if device.type != "cuda":
            raise ValueError(
                f"--dtype tf32: got a device of type {device.type}, expected cuda, whose format "
                "TF32 is; use float32 or bfloat16"
            )
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        _keep_freed_memory()
        capabilities = torch.cpu.get_capabilities()
        # "medium" lets oneDNN multiply float32 in place of MKL: 210 GFLOP/s here, not 150. Only
        # where there is AMX would it round to bfloat16 first; without, its products are float32's.
        if capabilities.get("avx512_f") and not capabilities.get("amx_tile"):
            torch.set_float32_matmul_precision("medium")


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step frees and takes again some 4 GB in gpt2-medium.

    By default each large tensor is mapped anew and its pages fault in one by one: a quarter of a
    bfloat16 step. The peak stays what it was.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def forward_context(tokens: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """In which a step's forward runs: autocast to a dtype other than float32, and the attention.

    On a CPU, short sequences take plain attention. The fused one saves the memory of the weights,
    (B, H, T, T), little at T = 64, and computes them again in the backward: 5 ms a block in
    bfloat16, where plain attention took 3.
    """
    device, short = tokens.device.type, tokens.shape[1] <= SHORT
    autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
    plain = sdpa_kernel(SDPBackend.MATH) if device == "cpu" and short else nullcontext()
    with autocast, plain:
        yield
