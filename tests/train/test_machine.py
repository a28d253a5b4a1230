"""What a training process sets: freed memory stays, float32 stays float32, attention is right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from train.machine import SHORT, forward_context, prepare

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

FAULTS = """
import resource, torch
from train.machine import prepare

def faults():
    torch.ones(16 << 20)  # 64 MB: 16,384 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(15 << 20)  # fits where the first one was
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
prepare(torch.device("cpu"), "float32")
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_once_freed_is_taken_again_without_page_faults() -> None:
    """A tensor of 60 MB made after one of 64 MB is let go of, before and after `prepare`: as the
    kernel counts. In a process of its own, for the setting stays."""
    output = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    before, after = map(int, output.split())
    assert before > 15_000
    assert after < 100


def test_products_of_float32_keep_its_precision() -> None:
    """Against float64, where rounding the arguments to bfloat16 would be wrong a hundred times
    more; on a processor that could do so (AMX) `prepare` must leave them alone."""
    prepare(CPU, "float32")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (a @ b - exact).abs().max() < (rounded - exact).abs().max() / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_attention_in_a_step_is_attention(length: int, dtype: torch.dtype) -> None:
    """Forward and gradient against the same call outside, to a few roundings, on both sides of the
    length at which the implementation changes; and it does change."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, length, 64, generator=generator).to(dtype)
    tokens = torch.zeros(2, length, dtype=torch.int64)

    def attend() -> tuple[torch.Tensor, torch.Tensor, str]:
        x = q.clone().requires_grad_()
        y = F.scaled_dot_product_attention(x, k, v, is_causal=True)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0], y.grad_fn.name()

    *expected, _ = attend()
    with forward_context(tokens, dtype):
        *got, name = attend()
    torch.testing.assert_close(got, expected, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert ("FlashAttention" in name) == (length > SHORT)


def test_autocast_is_on_in_bfloat16_alone() -> None:
    """By the dtype of a product inside and after."""
    tokens, a = torch.zeros(1, 8, dtype=torch.int64), torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with forward_context(tokens, dtype):
            assert (a @ a).dtype == dtype
        assert (a @ a).dtype == torch.float32


def test_tf32_is_refused_where_it_does_not_exist() -> None:
    """On a CPU nothing would be rounded: not what was asked for."""
    with pytest.raises(ValueError, match="got a device of type cpu, expected cuda"):
        prepare(CPU, "tf32")
