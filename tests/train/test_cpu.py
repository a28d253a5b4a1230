"""The fast path for products of few rows: same results, and used where it should be."""

import pytest
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Config
from model.generate import generate
from train import cpu
from train.cpu import few_row_products, linear


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
    """Counted: the head alone for a prompt of 17 rows, then all four per block and the head."""
    calls = []

    def record(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x.flatten(0, -2)))
        return F.linear(x, *rest)

    monkeypatch.setattr(cpu, "linear", record)
    model = GPT2(GPT2Config(vocab_size=301, n_positions=64, n_embd=128, n_layer=2, n_head=2))
    prompt = torch.zeros(1, 17, dtype=torch.int64)
    with few_row_products(prompt.device):
        generate(model, prompt, 3, temperature=0)
    assert calls == [1] * (1 + 2 * 9)
    torch.set_float32_matmul_precision("medium")  # oneDNN uses every core by itself
    with few_row_products(prompt.device):
        generate(model, prompt, 3, temperature=0)
    assert len(calls) == 1 + 2 * 9
