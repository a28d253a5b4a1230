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


@pytest.mark.parametrize(("device", "compiler"), [("cpu", r"g\+\+"), ("cuda", "gcc")])
def test_a_missing_compiler_is_named(device: str, compiler: str, monkeypatch) -> None:
    """Before anything is made; without --compile a CPU needs none."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    check_compilers(CPU, compiles=False)
    with pytest.raises(ValueError, match=f"install {compiler}$"):
        check_compilers(torch.device(device), compiles=True)
