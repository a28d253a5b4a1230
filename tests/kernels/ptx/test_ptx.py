"""The stand-in for a GPU: what Triton kernels may touch, how they round, and where it is absent."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.kl_cases import COMPILED_ON_CPU

pytestmark = pytest.mark.skipif(not COMPILED_ON_CPU, reason="for compiled kernels without a GPU")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tests.kernels.ptx import driver  # noqa: E402
from tests.kernels.ptx.counts import Traffic  # noqa: E402
from tests.kernels.ptx.memory import AccessError  # noqa: E402

ROOT = Path(__file__).parents[3]


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, shift, STEP: tl.constexpr):
    """target[i] = source[i + shift] for i < count; the address is promised to be divisible."""
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    source_ptr = tl.multiple_of(source_ptr + shift, STEP)
    tl.store(target_ptr + i, tl.load(source_ptr + i, i < count), i < count)


def copy(source, target, count, shift=0, step=4):
    copy_kernel[(triton.cdiv(count, 128),)](source, target, count, shift, step, num_warps=1)


@pytest.mark.parametrize(
    ("size", "shift", "step", "message"),
    [
        (303, 0, 4, "ld.*out of bounds"),
        (304, -1, 4, "ld.*out of bounds"),
        (400, 1, 16, "misaligned"),
    ],
)
def test_a_kernel_may_not_leave_the_storage_nor_break_a_promise(size, shift, step, message):
    """A source one short; one element before it; 4 bytes past a promised boundary of 16."""
    with pytest.raises(AccessError, match=message):
        copy(torch.ones(size), torch.zeros(304), 304, shift, step)
    with pytest.raises(AccessError, match=r"st.*out of bounds"):
        copy(torch.ones(304), torch.zeros(303), 304)


@triton.jit
def arithmetic_kernel(x_ptr, half_ptr, fma_ptr, power_ptr, FLOOR: tl.constexpr):
    """A conversion, a fused multiply-add, and 2^x, of 128 numbers."""
    i = tl.arange(0, 128)
    x = tl.load(x_ptr + i)
    tl.store(half_ptr + i, x)
    tl.store(fma_ptr + i, tl.fma(x, x, -1.00048828125))
    tl.store(power_ptr + i, tl.floor(x) if FLOOR else tl.exp2(x))


def test_numbers_are_rounded_once_and_an_unknown_instruction_is_refused():
    """bfloat16 to nearest, ties to even, NaN to NaN; (1 + e)^2 - (1 + 2 e) = e^2, which a rounded
    product would lose; a power below 2^-126 is 0."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(0))
    x[:5] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, float("nan"), 1 + 2.0**-12, -130.0])
    half, fma, power = x.bfloat16(), torch.zeros(128), torch.zeros(128)
    expected = half.clone()
    with driver.counted() as counted:
        arithmetic_kernel[(1,)](x, half.zero_(), fma, power, False)
    torch.testing.assert_close(half, expected, rtol=0, atol=0, equal_nan=True)
    assert (fma[3], power[4], counted[0][1].special) == (2.0**-24, 0.0, 128)
    with pytest.raises(NotImplementedError, match=r"cvt\.rmi"):
        arithmetic_kernel[(1,)](x, half, fma, power, True)


@pytest.mark.parametrize(("stride", "width", "sectors"), [(2, 4, 2), (16, 16, 16), (32, 4, 32)])
def test_sectors_are_counted_for_each_request_of_a_warp(stride, width, sectors):
    """Two warps at a stride in bytes; then 8 threads of each."""
    traffic, addresses = Traffic(), 64 + stride * np.arange(32)[None].repeat(2, 0)
    for threads in (32, 8):
        traffic.add(addresses, np.broadcast_to(np.arange(32) < threads, (2, 32)), width)
    assert traffic.bytes == 2 * (32 + 8) * width
    assert traffic.sectors == 2 * (sectors + max(1, sectors // 4))


def run(*arguments, **environment):
    """A process of its own, in which nothing stands in for a driver yet."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
    )


def test_triton_on_cpu_tensors_is_refused_outside_these_tests():
    """Compiled or not, no path falls back to another silently."""
    script = "import torch, kernels; z = torch.zeros(2, 8); p = z.softmax(-1)\n"
    result = run("-c", script + 'kernels.fused_kl_div(z, p, impl="triton")')
    assert "needs CUDA tensors, got cpu" in result.stderr.splitlines()[-1]
    assert "TRITON_INTERPRET=1" in result.stderr.splitlines()[-1]


def test_the_kernels_also_run_in_the_interpreter_that_triton_has():
    """With TRITON_INTERPRET=1: every kind of target that a kernel takes, on the short shapes."""
    names = "as_exact_as_the_reference and triton and (float32 or bfloat16)"
    names += " and not (simple and row)"  # dense targets, which triton-simple has no kernel for
    result = run("-m", "pytest", "tests/kernels/test_kl_div.py", "-k", names, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout
