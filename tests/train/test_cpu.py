"""Process settings that make a CPU fast; missing compilers."""

import pytest
import torch
import torch.nn.functional as F

from train.cpu import SHORT, check_compilers, prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize("amx", [False, True])
def test_float32_products_are_rounded_nowhere(amx: bool, monkeypatch) -> None:
    """At "medium", a processor with AMX would round their arguments to bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    prepare(CPU, SHORT)
    assert torch.get_float32_matmul_precision() == ("highest" if amx else "medium")


@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_attention_is_fused_above_a_length(length: int) -> None:
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
