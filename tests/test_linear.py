"""fused_linear_kl_div against F.linear and the loss: exactness, upstream gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from kernels import fused_kl_div, fused_linear_kl_div, ops
from kernels.linear import linear_kl_div
from kernels.reference import kl_div
from tests.kl_cases import (
    DEVICE,
    DTYPES,
    FUSED,
    TARGETS,
    assert_as_exact,
    make_target,
    random_logits,
    truth,
    two_level,
)

WIDTH = 16


def case(*leading, vocab=211, dtype=torch.float32):
    """Hidden states and a head whose logits spread by about 1.2; both ask for gradients."""
    hidden = random_logits(*leading, WIDTH, dtype=dtype, scale=1.0)
    weight = random_logits(vocab, WIDTH, dtype=dtype, seed=1, scale=0.3)
    return hidden.requires_grad_(), weight.requires_grad_()


def unfused(hidden, weight, target, reduction="batchmean", **_):
    return kl_div(F.linear(hidden, weight), target, reduction)


def results(loss, hidden, weight, *arguments, upstream=None, **options):
    value = loss(hidden, weight, *arguments, **options)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight), upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_loss_and_gradients_are_as_exact_as_the_unfused_ones(path, reduction, dtype):
    """Against float64; F.linear and the reference in the same dtype set the bound. A random
    upstream gradient for each row, and chunks that do not divide the rows."""
    shapes = [(7,), (2, 3)] if path == "triton" else [(7,), (2, 3), (1, 2, 5), (67,)]
    for leading in shapes:
        hidden, weight = case(*leading, dtype=dtype)
        for kind in TARGETS if dtype == torch.float32 else TARGETS[:1]:
            target = make_target(kind, (*leading, 211))
            upstream = random_logits(*leading, seed=5) if reduction == "none" else None
            args = target, reduction
            got = results(
                fused_linear_kl_div,
                hidden,
                weight,
                *args,
                upstream=upstream,
                chunk_rows=4,
                impl=path,
            )
            same = results(unfused, hidden, weight, *args, upstream=upstream)
            h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
            wide = target.double() if isinstance(target, torch.Tensor) else target
            up = None if upstream is None else upstream.double()
            exact = results(unfused, h, w, wide, reduction, upstream=up)
            # The interpreter truncates dz, and chunks of four rows are rounded one by one.
            slack = 2**-20 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
            for mine, its, true in zip(got, same, exact, strict=True):
                mine, its, true = (
                    x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1) for x in (mine, its, true)
                )
                eps = slack * max(1e-3, true.norm(dim=-1).max().item())
                assert_as_exact(mine, its, true, eps)


@pytest.mark.parametrize("path", [*FUSED, "reference"])
def test_the_lse_is_that_of_the_logits_and_carries_no_gradient(path):
    """Against float64, in the shape of the leading dimensions, over chunks that do not divide."""
    hidden, weight = case(2, 3)
    options = {"chunk_rows": 4, "impl": path, "return_lse": True}
    for reduction in ("batchmean", "none"):
        loss, lse = fused_linear_kl_div(hidden, weight, two_level(211), reduction, **options)
        exact = F.linear(hidden.detach().double(), weight.detach().double()).logsumexp(-1)
        torch.testing.assert_close(lse.double(), exact, rtol=2**-20, atol=0)
        assert loss.requires_grad
        assert not lse.requires_grad


@pytest.mark.parametrize("path", FUSED)
def test_the_loss_at_the_size_of_gpt2_is_that_of_the_unfused_one(path):
    """Three rows, 50,257 tokens, two chunks: loss and both gradients."""
    hidden, weight = case(3, vocab=50257)
    target = two_level(50257)
    got = results(fused_linear_kl_div, hidden, weight, target, chunk_rows=2, impl=path)
    expected = results(unfused, hidden, weight, target)
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=2e-8)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_any_upstream_gradient_scales_both_gradients_and_a_second_backward_agrees(reduction):
    """-2.5, 0 and 1 times; the second backward recomputes what the first one gave away."""
    hidden, weight = case(9)
    target = two_level(211, 2.0, 1.0)
    _, *unit = results(unfused, hidden, weight, target, reduction)
    for factor in (-2.5, 0.0, 1.0):
        loss = factor * fused_linear_kl_div(hidden, weight, target, reduction, chunk_rows=4)
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, (hidden, weight))
        for a, b, copy, one in zip(first, second, kept, unit, strict=True):
            assert torch.equal(a, copy)
            assert torch.equal(a, b)
            torch.testing.assert_close(a, factor * one, rtol=1e-5, atol=1e-6)


def test_gradients_come_only_where_they_are_asked_for(monkeypatch):
    """Hidden states alone, the head alone; without either, no gradient of the logits is formed."""
    hidden, weight = case(9)
    target = two_level(211)
    _, grad_hidden, grad_weight = results(unfused, hidden, weight, target)
    loss = fused_linear_kl_div(hidden, weight.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad_hidden)
    loss = fused_linear_kl_div(hidden.detach(), weight, target)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], grad_weight)
    packed = ops.pack(target, torch.Size((9, 211)))
    for needs in ((True, False), (False, True), (False, False)):
        _, _, *grads = linear_kl_div(
            hidden, weight, *packed, None, True, *needs, 4, hidden.dtype, "torch"
        )
        assert [g.numel() > 0 for g in grads] == list(needs)
    monkeypatch.setattr(ops.launchers("torch", hidden.device), "backward", None)
    fused_linear_kl_div(hidden.detach(), weight.detach(), target, impl="torch")
    with torch.no_grad():
        assert not fused_linear_kl_div(hidden, weight, target, impl="torch").requires_grad


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_autocast_keeps_float32_weights_and_their_gradient(reduction):
    """bfloat16 products as F.linear's; the weight's gradient is float32 and adds to the
    embedding's, as GPT-2's tied head needs; bounded by the unfused one's error to float64."""
    ids = torch.arange(12, device=DEVICE) % 5
    _, weight = case(1)
    target = two_level(211)

    def step(loss, dtype, autocast):
        w = weight.detach().to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss(F.embedding(ids, w), w, target, reduction, chunk_rows=5)
        value.sum().backward()
        return value.detach().reshape(-1, 1), w.grad

    got, same, exact = (
        step(fused_linear_kl_div, torch.float32, True),
        *(step(unfused, *how) for how in ((torch.float32, True), (torch.float64, False))),
    )
    assert got[1].dtype == torch.float32
    for mine, its, true in zip(got, same, exact, strict=True):
        assert_as_exact(mine, its, true, 2**-9 * true.norm(dim=-1).max().item())


def test_accumulation_over_chunks_is_in_float32_whatever_the_dtype():
    """512 rows one by one in bfloat16: summed in bfloat16, the weight's gradient would be wrong by
    several times the unfused one's error, which rounds once."""
    hidden, weight = case(512, vocab=31, dtype=torch.bfloat16)
    target = two_level(31)
    _, _, got = results(fused_linear_kl_div, hidden, weight, target, chunk_rows=1)
    _, _, same = results(unfused, hidden, weight, target)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    _, _, exact = results(unfused, *wide, target)
    assert (got.double() - exact).norm() <= 1.5 * (same.double() - exact).norm()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_derivatives_pass_gradcheck_and_second_ones_are_refused(reduction):
    """In float64; a second derivative names the function that has one."""
    hidden, weight = (x.detach().double().requires_grad_() for x in case(2, 3, vocab=11))
    target = two_level(11, 2.0, 1.0)

    def loss(h, w):
        return fused_linear_kl_div(h, w, target, reduction, chunk_rows=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    with pytest.raises(RuntimeError, match="use fused_kl_div"):
        torch.autograd.grad(loss(hidden, weight).sum(), hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_compiled_loss_is_one_graph_and_the_same(reduction):
    """torch.compile(fullgraph=True) against eager, loss and both gradients."""
    target = two_level(211)

    def loss(hidden, weight):
        return fused_linear_kl_div(hidden * 2, weight, target, reduction, chunk_rows=4).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):
        hidden, weight = case(rows)
        for got, expected in zip(
            results(compiled, hidden, weight), results(loss, hidden, weight), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("flags", [(True, True, True), (False, True, False), (True, False, False)])
def test_the_operator_passes_opcheck(flags):
    """Schema, fake kernel, AOT dispatch with dynamic shapes; autograd stands above the operator."""
    hidden, weight = (x.detach() for x in case(7, vocab=40))
    packed = ops.pack(two_level(40, 2.0, 1.0), torch.Size((7, 40)))
    opcheck(linear_kl_div, (hidden, weight, *packed, None, *flags, 3, torch.float32, "torch"))


def test_an_exported_loss_and_one_on_the_meta_device_run():
    """torch.export with a dynamic batch, against eager; a step on meta has the right shapes."""

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight):
            return fused_linear_kl_div(hidden, weight, target)

    target = two_level(211)
    hidden, weight = case(2, 5)
    dynamic = ({0: torch.export.Dim("batch")}, None)
    program = torch.export.export(Loss(), (hidden, weight), dynamic_shapes=dynamic)
    other, _ = case(4, 5)
    torch.testing.assert_close(
        program.module()(other, weight), fused_linear_kl_div(other, weight, target)
    )
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in (hidden, weight))
    fused_linear_kl_div(hidden, weight, target).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


def test_no_rows_give_the_unfused_result():
    """A mean of nothing is NaN, a sum 0, and the gradients are zero."""
    hidden, weight = case(2, 0)
    target = two_level(211)
    assert fused_linear_kl_div(hidden, weight, target).isnan()
    loss, grad_hidden, grad_weight = results(fused_linear_kl_div, hidden, weight, target, "sum")
    assert loss == 0
    assert grad_hidden.shape == (2, 0, WIDTH)
    assert (grad_weight == 0).all()
    assert fused_linear_kl_div(hidden, weight, target, "none").shape == (2, 0)


def test_two_runs_agree_bitwise():
    hidden, weight = case(20)
    first, second = (
        results(fused_linear_kl_div, hidden, weight, two_level(211), chunk_rows=6) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_identity_head_gives_the_fused_loss():
    """hidden = logits and W = I: the two public losses agree to rounding."""
    logits, target = random_logits(5, 40), two_level(40)
    head = torch.eye(40, device=DEVICE)
    loss = fused_linear_kl_div(logits, head, target, "none")
    torch.testing.assert_close(loss, fused_kl_div(logits, target, "none"))
    torch.testing.assert_close(loss.double(), truth(logits, target)[0], rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_refused_by_name():
    hidden, weight = case(3)
    target = two_level(211)
    refused = [
        (ValueError, r"weight \(V, C\)", (hidden, weight.t(), target), {}),
        (TypeError, "autocast", (hidden.bfloat16(), weight, target), {}),
        (TypeError, "floating-point", (hidden.long(), weight, target), {}),
        (ValueError, "is on", (hidden.to("meta"), weight, target), {}),
        (ValueError, "chunk_rows", (hidden, weight, target), {"chunk_rows": 0}),
        (ValueError, "vocabulary", (hidden, weight, two_level(210)), {}),
        (ValueError, "must be one of", (hidden, weight, target, "mean"), {}),
    ]
    for error, message, arguments, options in refused:
        with pytest.raises(error, match=message):
            fused_linear_kl_div(*arguments, **options)
