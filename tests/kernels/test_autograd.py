"""fused_kl_div within PyTorch: upstream gradients, versions, compile, export, opcheck, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from kernels import TwoLevelTarget, fused_kl_div
from kernels.fused_kl_div import OPERATORS
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    PATHS,
    TARGETS,
    make_target,
    parts_of,
    random_logits,
    rows_and_gradient,
    truth,
    two_level,
)

VOCAB = 133


@pytest.mark.parametrize("path", PATHS)
def test_any_upstream_gradient_scales_its_row(path):
    """1, 2, 0, -1, random per row, and an expanded one of stride 0: against float64."""
    logits, target = random_logits(5, VOCAB), two_level(VOCAB, 2.0, 1.0)
    _, exact = truth(logits, target)
    constants = [torch.full((5,), value, device=DEVICE) for value in (1.0, 2.0, 0.0, -1.0)]
    strided = random_logits(10, seed=2)[::2]
    for upstream in (*constants, random_logits(5, seed=1), strided, strided[:1].expand(5)):
        _, gradient = rows_and_gradient(path, logits, target, upstream)
        expected = exact * upstream.double()[:, None]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [kl_div, fused_kl_div])
def test_reductions_are_the_mean_the_sum_and_the_rows(loss):
    """Over all leading dimensions: F.kl_div's own "batchmean" divides by the first one only."""
    logits, target = random_logits(2, 3, VOCAB), two_level(VOCAB)
    rows = loss(logits, target, "none")
    assert rows.shape == (2, 3)
    torch.testing.assert_close(loss(logits, target, "sum"), rows.sum())
    torch.testing.assert_close(loss(logits, target), rows.sum() / 6)


@pytest.mark.parametrize("path", FUSED)
def test_the_callers_logits_are_left_alone(path):
    """They and their version counter do not change, and two backward calls agree bitwise."""
    logits = random_logits(3, VOCAB).requires_grad_()
    before, version = logits.detach().clone(), logits._version
    loss = fused_kl_div(logits, two_level(VOCAB), impl=path)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(logits, before)
    assert logits._version == version
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", FUSED)
def test_inplace_backward_writes_the_gradient_over_the_logits(path):
    """The same gradient as without it; a second backward or derivative raises, as the logits are
    gone."""
    leaf, target = random_logits(2, 3, VOCAB).requires_grad_(), two_level(VOCAB, 2.0, 1.0)
    (expected,) = torch.autograd.grad(fused_kl_div(leaf, target, impl=path), leaf)
    logits = leaf * 1.0
    loss = fused_kl_div(logits, target, inplace_backward=True, impl=path)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = fused_kl_div(leaf * 1.0, target, inplace_backward=True, impl=path)
    with pytest.raises(RuntimeError, match="pass inplace_backward=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_inplace_backward_of_logits_that_are_copied_leaves_them_alone():
    """Transposed, expanded, and rows at no single stride: the copy is overwritten instead."""
    base = random_logits(4, 6, 6)
    for view in (base.transpose(1, 2), base[:1].expand(3, 6, 6), base[:, :-1]):
        leaf, before = view.detach().requires_grad_(), view.clone()
        fused_kl_div(leaf, two_level(6), inplace_backward=True).backward()
        assert torch.equal(view, before)
        _, exact = truth(before, two_level(6))
        torch.testing.assert_close(leaf.grad.double(), exact / exact[..., 0].numel())


@pytest.mark.parametrize("kind", TARGETS)
def test_derivatives_pass_gradcheck_and_second_ones_are_refused(kind):
    """In float64, one loss per row, by finite differences; then a second derivative raises."""
    logits = random_logits(2, 3, 11).double().requires_grad_()
    target = make_target(kind, logits.shape)

    def loss(z):
        return fused_kl_div(z, target, "none", impl="torch")

    assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use kernels\.reference\.kl_div"):
        gradient.sum().backward()


@pytest.mark.parametrize("path", FUSED)
def test_the_operators_pass_opcheck(path):
    """Schema, fake kernels, AOT dispatch with dynamic shapes; autograd is above the operators."""
    logits, upstream = random_logits(3, 40), random_logits(3, seed=1)
    parts = *parts_of(two_level(40), logits), path
    forward, backward, backward_ = OPERATORS["two_level"]
    opcheck(forward, (logits, *parts))
    _, *of_rows = forward(logits, *parts)
    opcheck(backward, (logits, *of_rows, upstream, *parts))
    opcheck(backward_, (logits, *of_rows, upstream, *parts))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("path", FUSED)
def test_a_compiled_loss_is_one_graph_and_the_same(path, inplace):
    """torch.compile(fullgraph=True) against eager: loss and gradients, for two numbers of rows."""
    target = two_level(VOCAB, 2.0, 1.0)

    def loss(hidden, head):
        return fused_kl_div(F.linear(hidden, head), target, inplace_backward=inplace, impl=path)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    head = random_logits(VOCAB, 8, seed=1).requires_grad_()
    for rows in (3, 5):
        hidden = random_logits(rows, 8).requires_grad_()
        results = []
        for function in (compiled, loss):
            value = function(hidden, head)
            results.append((value.detach(), *torch.autograd.grad(value, (hidden, head))))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_an_exported_loss_runs_on_another_batch():
    """torch.export with dynamic leading dimensions, against eager."""

    class Loss(torch.nn.Module):
        def forward(self, logits):
            return fused_kl_div(logits, target)

    target = two_level(VOCAB)
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    program = torch.export.export(Loss(), (random_logits(2, 3, VOCAB),), dynamic_shapes=dynamic)
    other = random_logits(5, 4, VOCAB, seed=1)
    torch.testing.assert_close(program.module()(other), fused_kl_div(other, target))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_on_the_meta_device_has_shapes_and_no_data(inplace):
    """Forward and backward read no data."""
    logits = torch.empty(2, 3, VOCAB, device="meta", dtype=torch.bfloat16, requires_grad=True)
    loss = fused_kl_div(logits, two_level(VOCAB).to("meta"), inplace_backward=inplace)
    loss.backward()
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    assert (logits.grad.dtype, logits.grad.shape) == (torch.bfloat16, (2, 3, VOCAB))


def test_bad_arguments_are_refused_by_name():
    """Every message says what was got and what was expected."""
    logits, target = random_logits(2, 8), two_level(8)
    half = torch.full((8,), 1 / 8, device=DEVICE)
    refused = [
        (TypeError, "logits must be", (logits.long(), target), {}),
        (TypeError, "logits must be", ([[0.0]], target), {}),
        (TypeError, r"\(\.\.\., V\)", (logits.sum(), target), {}),
        (ValueError, 'pass "batchmean" for the mean', (logits, target, "mean"), {}),
        (ValueError, r"fit logits of shape \(2, 8\)", (logits, two_level(9)), {}),
        (TypeError, "TwoLevelTarget", (logits, target.mask), {}),
        (TypeError, "TwoLevelTarget", (logits, None), {}),
        (ValueError, r"fit logits of shape \(2, 8\)", (logits, half[None]), {}),
        (TypeError, "to_dense", (logits, logits.softmax(-1).to_sparse()), {}),
        (ValueError, r"target\.to\(device\)", (logits, half.to("meta")), {}),
        (ValueError, "impl must be", (logits, target), {"impl": "cuda"}),
        (TypeError, "float64", (logits.double(), target), {"impl": "triton"}),
    ]
    for error, message, arguments, options in refused:
        with pytest.raises(error, match=message):
            fused_kl_div(*arguments, **options)


@pytest.mark.parametrize("path", FUSED)
def test_gradient_of_a_float16_loss_survives_a_scaled_upstream(path):
    """A gradient scaler's 65,536 enters before the one rounding to float16, not after it: against
    float64. The unscaled gradient is below float16's smallest normal number, 6e-5."""
    logits = random_logits(4, 4096, dtype=torch.float16).requires_grad_()
    target = TwoLevelTarget(torch.arange(4096, device=DEVICE) < 8)
    (fused_kl_div(logits, target, impl=path) * 65536).backward()
    _, exact = truth(logits, target)
    torch.testing.assert_close(logits.grad.double(), exact * 16384, rtol=1e-3, atol=1e-7)
