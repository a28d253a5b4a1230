"""Process settings that make a CPU fast without changing results, and products of few rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Config
from model.generate import generate
from train import cpu
from train.cpu import SHORT, few_row_products, linear, prepare

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = GPT2Config(vocab_size=301, n_positions=64, n_embd=128, n_layer=2, n_head=2)

FAULTS = """
import resource, torch
from train.cpu import prepare

def faults():
    torch.ones(16 << 20)  # 64 MB: 16,384 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(15 << 20)  # fits where the first one was
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
prepare(torch.device("cpu"), 64)
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_once_freed_is_taken_again_without_page_faults() -> None:
    """A tensor of 60 MB allocated after one of 64 MB was freed, before and after `prepare`, as the
    kernel counts. In a process of its own, since the setting stays."""
    output = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    before, after = map(int, output.split())
    assert before > 15_000
    assert after < 100


def test_products_of_float32_keep_its_precision() -> None:
    """Against float64, where rounding the arguments to bfloat16 would be wrong a hundred times
    more; on a processor that could do so (AMX) `prepare` must leave them alone."""
    prepare(CPU, 64)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (a @ b - exact).abs().max() < (rounded - exact).abs().max() / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_attention_after_prepare_is_attention(length: int, dtype: torch.dtype) -> None:
    """Forward and gradient against the default choice, to a few roundings, on both sides of the
    length at which the implementation changes; and it does change."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, length, 64, generator=generator).to(dtype)

    def attend() -> tuple[torch.Tensor, torch.Tensor, str]:
        x = q.clone().requires_grad_()
        y = F.scaled_dot_product_attention(x, k, v, is_causal=True)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0], y.grad_fn.name()

    *expected, _ = attend()
    prepare(CPU, length)
    *got, name = attend()
    torch.testing.assert_close(got, expected, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert ("FlashAttention" in name) == (length > SHORT)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("stored", ["(in, out)", "(out, in)"])
def test_a_few_rows_are_multiplied_as_f_linear_does(stored: str, threads: int) -> None:
    """Against float64: no worse than F.linear by more than a rounding of the sum; also where the
    slices do not divide the weight, with and without a bias, rows of any leading shape."""
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(301, generator=g)
    weight = torch.randn(128, 301, generator=g).T
    weight = weight if stored == "(in, out)" else weight.contiguous()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for leading in ((1, 1), (5,), (2, 8)):
            x = torch.randn(*leading, 128, generator=g)
            for b in (None, bias):
                exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
                error = (linear(x, weight, b) - exact).abs().max()
                assert error <= 2 * (F.linear(x, weight, b) - exact).abs().max() + 1e-6
    finally:
        torch.set_num_threads(before)


def test_generation_shares_every_product_of_a_few_rows(monkeypatch) -> None:
    """For a prompt of 17 rows only the head, then per token the head and four per block."""
    model, calls = GPT2(CONFIG), []

    def record(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x.flatten(0, -2)))
        return F.linear(x, *rest)

    def sample(model: GPT2, prompt: torch.Tensor) -> None:
        with few_row_products(CPU):
            generate(model, prompt, 3, temperature=0)

    monkeypatch.setattr(cpu, "linear", record)
    prompt = torch.zeros(1, 17, dtype=torch.int64)
    sample(model, prompt)
    assert calls == [1] * (1 + 2 * 9)
    torch.set_float32_matmul_precision("medium")  # oneDNN shares them itself
    sample(model, prompt)
    assert len(calls) == 1 + 2 * 9
