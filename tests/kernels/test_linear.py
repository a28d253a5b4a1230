"""fused_linear_kl_div against F.linear and the loss: exactness, dtypes, chunks."""

import pytest
import torch
import torch.nn.functional as F

from kernels import fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    FUSED,
    HEAD_WIDTH,
    TARGETS,
    assert_as_exact,
    hidden_and_head,
    loss_and_gradients,
    make_target,
    random_logits,
    two_level,
    unfused_linear,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_loss_and_gradients_are_as_exact_as_the_unfused_ones(path, reduction, dtype):
    """fused_linear_kl_div (1) (2) (3): against float64; F.linear and the reference in the same
    dtype set the bound. An upstream gradient per row, and chunks that do not divide the rows."""
    shapes = [(7,), (2, 3)] if path == "triton" else [(7,), (2, 3), (1, 2, 5), (67,)]
    for leading in shapes:
        hidden, weight = hidden_and_head(*leading, dtype=dtype)
        for kind in TARGETS if dtype == torch.float32 else TARGETS[:1]:
            target = make_target(kind, (*leading, 211))
            upstream = random_logits(*leading, seed=5) if reduction == "none" else None
            args = target, reduction
            got = loss_and_gradients(
                fused_linear_kl_div,
                hidden,
                weight,
                *args,
                upstream=upstream,
                chunk_rows=4,
                impl=path,
            )
            same = loss_and_gradients(unfused_linear, hidden, weight, *args, upstream=upstream)
            h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
            wide = target.double() if isinstance(target, torch.Tensor) else target
            up = None if upstream is None else upstream.double()
            exact = loss_and_gradients(unfused_linear, h, w, wide, reduction, upstream=up)
            # Triton's interpreter truncates dz, and each chunk of four rows is rounded.
            slack = 2**-20 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
            for mine, its, true in zip(got, same, exact, strict=True):
                mine, its, true = (
                    x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1) for x in (mine, its, true)
                )
                eps = slack * max(1e-3, true.norm(dim=-1).max().item())
                assert_as_exact(mine, its, true, eps)


@pytest.mark.parametrize("path", FUSED)
def test_the_loss_at_the_size_of_gpt2_is_that_of_the_unfused_one(path):
    """Three rows, 50,257 tokens, two chunks: loss and both gradients."""
    hidden, weight = hidden_and_head(3, vocab=50257)
    target = two_level(50257)
    got = loss_and_gradients(fused_linear_kl_div, hidden, weight, target, chunk_rows=2, impl=path)
    expected = loss_and_gradients(unfused_linear, hidden, weight, target)
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=2e-8)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_autocast_keeps_float32_weights_and_their_gradient(reduction):
    """Products are in bfloat16, as F.linear's; the weight's gradient is float32 and adds to the
    embedding's, as GPT-2's tied head needs. The unfused loss's error to float64 is the bound."""
    ids = torch.arange(12, device=DEVICE) % 5
    _, weight = hidden_and_head(1)
    target = two_level(211)

    def step(loss, dtype, autocast):
        w = weight.detach().to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss(F.embedding(ids, w), w, target, reduction, chunk_rows=5)
        value.sum().backward()
        return value.detach().reshape(-1, 1), w.grad

    got, same, exact = (
        step(fused_linear_kl_div, torch.float32, True),
        *(step(unfused_linear, *how) for how in ((torch.float32, True), (torch.float64, False))),
    )
    assert got[1].dtype == torch.float32
    for mine, its, true in zip(got, same, exact, strict=True):
        assert_as_exact(mine, its, true, 2**-9 * true.norm(dim=-1).max().item())


def test_autocast_leaves_float64_as_it_is():
    """As F.linear's: bit for bit the loss and gradients without autocast; a float64 and a float32
    argument are refused, of which F.linear would make two dtypes."""
    hidden, weight = (x.detach().double().requires_grad_() for x in hidden_and_head(3))
    arguments = fused_linear_kl_div, hidden, weight, two_level(211)
    expected = loss_and_gradients(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = loss_and_gradients(*arguments)
        with pytest.raises(TypeError, match="convert one"):
            fused_linear_kl_div(hidden, weight.float(), two_level(211))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].dtype == torch.float64


def test_a_head_of_more_than_a_weight_is_one_merged_weight():
    """LoRA and a bias, as the docstring merges them: loss and gradients of every part are those of
    the unfused head."""
    hidden, base = (x.detach() for x in hidden_and_head(5))
    parts = [random_logits(*shape, seed=2, scale=0.3) for shape in ((211, 2), (2, 16), (211,))]
    leaves = [x.requires_grad_() for x in (hidden, *parts)]
    h, b, a, bias = leaves
    weight = base + 0.5 * b @ a
    expected = kl_div(F.linear(h, weight, bias), two_level(211))
    wide = torch.cat([h, torch.ones(5, 1, device=DEVICE)], 1), torch.cat([weight, bias[:, None]], 1)
    got = fused_linear_kl_div(*wide, two_level(211))
    torch.testing.assert_close(got, expected)
    for x in leaves:
        gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_accumulation_over_chunks_is_in_float32_whatever_the_dtype():
    """512 chunks of one row in bfloat16: a weight's gradient summed in bfloat16 would have several
    times the error of the unfused one, which is rounded once."""
    hidden, weight = hidden_and_head(512, vocab=31, dtype=torch.bfloat16)
    target = two_level(31)
    _, _, got = loss_and_gradients(fused_linear_kl_div, hidden, weight, target, chunk_rows=1)
    _, _, same = loss_and_gradients(unfused_linear, hidden, weight, target)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    _, _, exact = loss_and_gradients(unfused_linear, *wide, target)
    assert (got.double() - exact).norm() <= 1.5 * (same.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_rows_give_the_unfused_result(dtype):
    """A mean of nothing is NaN, a sum 0, and the gradients of both are zero: an optimiser step
    changes nothing. float16 forms them in the backward."""
    hidden, weight = hidden_and_head(2, 0, dtype=dtype)
    target = two_level(211)
    for reduction in ("batchmean", "sum"):
        loss, grad_hidden, grad_weight = loss_and_gradients(
            fused_linear_kl_div, hidden, weight, target, reduction
        )
        assert loss.isnan() if reduction == "batchmean" else loss == 0
        assert grad_hidden.shape == (2, 0, HEAD_WIDTH)
        assert (grad_weight == 0).all()
    assert fused_linear_kl_div(hidden, weight, target, "none").shape == (2, 0)


def test_two_runs_agree_bitwise():
    """Loss and both gradients, over chunks that do not divide the rows."""
    hidden, weight = hidden_and_head(20)
    first, second = (
        loss_and_gradients(fused_linear_kl_div, hidden, weight, two_level(211), chunk_rows=6)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_refused_by_name():
    """Every message says what was got and what was expected."""
    hidden, weight = hidden_and_head(3)
    target = two_level(211)
    refused = [
        (ValueError, r"weight \(V, C\)", (hidden, weight.t(), target), {}),
        (TypeError, "autocast", (hidden.bfloat16(), weight, target), {}),
        (TypeError, "floating-point", (hidden.long(), weight, target), {}),
        (ValueError, "on one device", (hidden.to("meta"), weight, target), {}),
        (ValueError, "chunk_rows", (hidden, weight, target), {"chunk_rows": 0}),
        (ValueError, "chunk_rows", (hidden, weight, target), {"chunk_rows": 2.5}),
        (ValueError, "must fit", (hidden, weight, two_level(210)), {}),
        (ValueError, "must be one of", (hidden, weight, target, "mean"), {}),
    ]
    for error, message, arguments, options in refused:
        with pytest.raises(error, match=message):
            fused_linear_kl_div(*arguments, **options)
