"""fused_linear_kl_div within PyTorch: upstream gradients, compile, export, opcheck."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch.library import opcheck

from kernels import fused_linear_kl_div
from kernels.fused_kl_div import launchers
from kernels.fused_linear_kl_div import OPERATORS, scale_
from tests.kernels.kl_cases import (
    COMPILED_ON_CPU,
    FUSED,
    hidden_and_head,
    loss_and_gradients,
    random_logits,
    two_level,
    unfused_linear,
)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("path", FUSED)
def test_any_upstream_gradient_scales_both_gradients_and_a_second_backward_agrees(path, reduction):
    """Times -2.5, 0 and 1; the second backward recomputes what the first
    one scaled in place."""
    hidden, weight = hidden_and_head(9)
    target = two_level(211, 2.0, 1.0)
    _, *unit = loss_and_gradients(unfused_linear, hidden, weight, target, reduction)
    for factor in (-2.5, 0.0, 1.0):
        loss = fused_linear_kl_div(hidden, weight, target, reduction, chunk_rows=4, impl=path)
        loss = factor * loss
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, (hidden, weight))
        for a, b, copy, one in zip(first, second, kept, unit, strict=True):
            assert torch.equal(a, copy)
            for gradient in (a, b):
                torch.testing.assert_close(gradient, factor * one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", FUSED)
def test_the_usual_upstream_gradient_moves_nothing(path, monkeypatch):
    """loss.backward() of a mean, with weights or without, hands 1 to the gradients that the forward
    has made: on the CPU no product is called, on CUDA the kernel stores nothing."""
    hidden, weight = hidden_and_head(9)
    weights = torch.arange(9.0, device=hidden.device)
    for options in ({}, {"row_weights": weights}):
        loss = fused_linear_kl_div(hidden, weight, two_level(211), impl=path, **options)
        counts = nullcontext([])
        if path == "triton" and COMPILED_ON_CPU:
            counts = import_module("tests.kernels.ptx.driver").counted()
        with monkeypatch.context() as patch, counts as launches:
            if path == "triton" or hidden.device.type == "cpu":
                patch.setattr(torch.Tensor, "mul_", None)
            loss.backward()
        assert all(counts.stores.bytes == 0 for _, counts in launches)
        assert len(launches) == (2 if path == "triton" and COMPILED_ON_CPU else 0)


def test_gradients_come_only_where_they_are_asked_for(monkeypatch):
    """For hidden states alone, for the head alone; for neither, the loss's backward never runs."""
    hidden, weight = hidden_and_head(9)
    target = two_level(211)
    _, grad_hidden, grad_weight = loss_and_gradients(unfused_linear, hidden, weight, target)
    loss = fused_linear_kl_div(hidden, weight.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad_hidden)
    loss = fused_linear_kl_div(hidden.detach(), weight, target)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], grad_weight)
    g = torch.ones(9, device=hidden.device)
    for needs in ((True, False), (False, True), (False, False)):
        options = *needs, 4, hidden.dtype, *target.parts, "torch"
        _, grad_hidden, grad_weight = OPERATORS["two_level"](hidden, weight, g, *options)
        grads = grad_hidden, grad_weight
        assert [g.numel() > 0 for g in grads] == list(needs)
    monkeypatch.setattr(launchers("torch", hidden.device), "backward", None)
    fused_linear_kl_div(hidden.detach(), weight.detach(), target, impl="torch")
    with torch.no_grad():
        assert not fused_linear_kl_div(hidden, weight, target, impl="torch").requires_grad


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_derivatives_pass_gradcheck_and_second_ones_are_refused(reduction):
    """In float64; the error names the function that has second derivatives."""
    hidden, weight = (x.detach().double().requires_grad_() for x in hidden_and_head(2, 3, vocab=11))
    target = two_level(11, 2.0, 1.0)

    def loss(h, w):
        return fused_linear_kl_div(h, w, target, reduction, chunk_rows=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    grads = torch.autograd.grad(loss(hidden, weight).sum(), (hidden, weight), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"use kernels\.reference\.kl_div"):
            torch.autograd.grad(grad.sum(), hidden, retain_graph=True)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_compiled_loss_is_one_graph_and_the_same(reduction):
    """torch.compile(fullgraph=True) against eager, loss and both gradients."""
    target = two_level(211)

    def loss(hidden, weight):
        return fused_linear_kl_div(hidden * 2, weight, target, reduction, chunk_rows=4).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):
        hidden, weight = hidden_and_head(rows)
        for got, expected in zip(
            loss_and_gradients(compiled, hidden, weight),
            loss_and_gradients(loss, hidden, weight),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_the_operator_passes_opcheck(flags):
    """Schema, fake kernel, AOT dispatch with dynamic shapes; autograd is above the operator."""
    hidden, weight = (x.detach() for x in hidden_and_head(7, vocab=40))
    g = random_logits(7, seed=2)
    options = *flags, 3, torch.float32, *two_level(40, 2.0, 1.0).parts, "torch"
    opcheck(OPERATORS["two_level"], (hidden, weight, g, *options))
    opcheck(scale_, (g, torch.tensor(2.0, device=g.device), "torch"))


def test_an_exported_loss_and_one_on_the_meta_device_run():
    """torch.export with a dynamic batch, against eager; a step on meta has the right shapes."""

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight):
            return fused_linear_kl_div(hidden, weight, target)

    target = two_level(211)
    hidden, weight = hidden_and_head(2, 5)
    dynamic = ({0: torch.export.Dim("batch")}, None)
    program = torch.export.export(Loss(), (hidden, weight), dynamic_shapes=dynamic)
    other, _ = hidden_and_head(4, 5)
    torch.testing.assert_close(
        program.module()(other, weight), fused_linear_kl_div(other, weight, target)
    )
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in (hidden, weight))
    fused_linear_kl_div(hidden, weight, target.to("meta")).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
