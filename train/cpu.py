"""The machine: compilers that must be there, and process settings that make a CPU fast."""

import ctypes
import os
import shutil
import sysconfig
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
SHORT = 64  # T up to which plain attention is faster than the fused one


def check_compilers(device: torch.device, compiles: bool) -> None:
    """Raise ValueError if Triton lacks a compiler, or torch.compile does and the run `compiles`."""
    if device.type == "cuda":
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise ValueError("Triton needs a C compiler to launch kernels; install gcc")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise ValueError("Triton needs Python.h to launch kernels; install python3-dev")
    elif compiles and not (os.environ.get("CXX") or shutil.which("g++")):
        raise ValueError("--compile needs a C++ compiler; install g++")


def prepare(device: torch.device, length: int) -> None:
    """Set up this process for steps on sequences of `length` tokens; do nothing on a GPU.

    Results change by rounding at most. Figures are for gpt2-medium, B = 4, T = 64, on two Zen 4
    cores (AVX-512 with bf16, no AMX).

    Memory: make glibc keep freed memory. A step of gpt2-medium frees and allocates some 4 GB, and
    by default Linux maps each large tensor again, page by page: a quarter of a bfloat16 step.

    Products: at precision "medium", oneDNN multiplies float32 matrices at 210 GFLOP/s, MKL at 150.
    This is not set on CPUs with AMX, where it would round to bfloat16.

    Attention: the fused kernel recomputes the attention weights, (B, H, T, T), in the backward. At
    T = 64 that saves little memory and takes 5 ms per block in bfloat16; plain attention takes 3.
    """
    if device.type != "cpu":
        return
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    # torch.cpu.get_capabilities() would say it too, but not in PyTorch 2.9.
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(length > SHORT)  # despite its name, the CPU's as well
