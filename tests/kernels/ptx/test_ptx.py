"""The stand-in for a GPU: what Triton kernels may touch, what is counted, where it is absent."""

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

from tests.kernels.ptx.memory import AccessError, Traffic  # noqa: E402

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
    result = run("-m", "pytest", "tests/kernels/test_kl_div.py", "-k", names, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout
