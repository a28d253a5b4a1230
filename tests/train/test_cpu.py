"""Process settings that make a CPU fast change results by rounding at most; missing compilers."""

import pytest
import torch
import torch.nn.functional as F

from train.cpu import SHORT, check_compilers, prepare

CPU = torch.device("cpu")


def test_products_of_float32_keep_its_precision() -> None:
    """Against float64, where rounding the arguments to bfloat16 would be wrong a hundred times
    more; on a processor that could do so (AMX) `prepare` must leave them alone."""
    prepare(CPU, 64)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (a @ b - exact).abs().max() < (rounded - exact).abs().max() / 100


@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_attention_changes_its_implementation_at_a_length(length: int) -> None:
    """Plain up to SHORT, fused above."""
    prepare(CPU, length)
    q = torch.ones(2, 4, length, 64, requires_grad=True)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert ("FlashAttention" in y.grad_fn.name()) == (length > SHORT)


@pytest.mark.parametrize(("device", "compiler"), [("cpu", r"g\+\+"), ("cuda", "gcc")])
def test_a_missing_compiler_is_named(device: str, compiler: str, monkeypatch) -> None:
    """Before anything is made; without --compile a CPU needs none."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    check_compilers(CPU, compiles=False)
    with pytest.raises(ValueError, match=f"install {compiler}$"):
        check_compilers(torch.device(device), compiles=True)
