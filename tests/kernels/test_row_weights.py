"""row_weights in both losses; heads without a width; the products of the fused head."""

import itertools
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div
from kernels.fused_linear_kl_div import _add_product, _product
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    hidden_and_head,
    loss_and_gradients,
    random_logits,
    two_level,
)

WEIGHTS = torch.tensor([[1.0, 0.0, 2.5], [0.0, 1.0, 0.5]], device=DEVICE)


def weighted(hidden, weight, target, reduction, weights):
    """The definition: the loss of each row times its weight; the mean divides by their sum."""
    rows = kl_div(F.linear(hidden, weight), target, "none") * weights
    if reduction == "none":
        return rows
    return rows.sum() / (weights.sum() if reduction == "batchmean" else 1)


def fused(hidden, weight, target, reduction, weights, path):
    logits = F.linear(hidden, weight)
    return fused_kl_div(logits, target, reduction, impl=path, row_weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_weights_scale_their_rows_and_the_mean_divides_by_their_sum(path, reduction, dtype):
    """Both losses, values and both gradients, against the definition; a mask is a weight too."""
    weights, target = WEIGHTS.to(dtype), two_level(211, 2.0, 1.0)
    hidden, weight = hidden_and_head(2, 3)
    upstream = random_logits(2, 3, seed=5) if reduction == "none" else None
    arguments = hidden, weight, target, reduction
    expected = loss_and_gradients(weighted, *arguments, weights.float(), upstream=upstream)
    options = {"chunk_rows": 4, "impl": path, "row_weights": weights}
    linear = loss_and_gradients(fused_linear_kl_div, *arguments, upstream=upstream, **options)
    for results in (
        linear,
        loss_and_gradients(fused, *arguments, weights, path, upstream=upstream),
    ):
        for got, its in zip(results, expected, strict=True):
            torch.testing.assert_close(got, its, rtol=2e-5, atol=1e-6)
    assert (linear[1][weights == 0] == 0).all()


@pytest.mark.parametrize("path", FUSED)
def test_a_row_of_weight_zero_costs_nothing_whatever_its_loss(path):
    """An infinite loss, as -inf at a target token gives it, is left out and not 0 * inf."""
    hidden, weight = (x.detach() for x in hidden_and_head(2, 3, vocab=40))
    hidden[..., 0] = weight[:, 0] = 0
    hidden[0, 1, 0], weight[0, 0] = 1e20, -1e20  # a logit of -inf in a row of weight zero
    target, kept = two_level(40), WEIGHTS > 0
    rows = kl_div(F.linear(hidden, weight), target, "none")
    assert rows[0, 1].isposinf()
    expected = (rows[kept] * WEIGHTS[kept]).sum() / WEIGHTS.sum()
    leaf = hidden.requires_grad_()
    options = {"impl": path, "row_weights": WEIGHTS}
    for loss in (
        fused_kl_div(F.linear(leaf, weight), target, **options),
        fused_linear_kl_div(leaf, weight, target, chunk_rows=4, **options),
    ):
        torch.testing.assert_close(loss.detach(), expected)
        assert (torch.autograd.grad(loss, leaf)[0][~kept] == 0).all()


@pytest.mark.parametrize(
    ("path", "target"),
    [*itertools.product(FUSED, ["two-level", "teacher"]), ("triton-simple", "two-level")],
)
def test_nan_in_a_row_of_weight_zero_reaches_nothing(path, target):
    """Padding may hold anything: neither the loss, nor another row, nor the head sees it."""
    hidden, weight = (x.detach() for x in hidden_and_head(2, 3))
    t = two_level(211) if target == "two-level" else TeacherTarget(random_logits(2, 3, 211))
    options = {"impl": path, "row_weights": WEIGHTS}

    def results(hidden):
        z = F.linear(hidden, weight).requires_grad_()
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear = fused_linear_kl_div(h, w, t, chunk_rows=4, **options)
        fused = fused_kl_div(z, t, **options)
        (linear + fused).backward()
        return linear.detach(), fused.detach(), h.grad, w.grad, z.grad

    padded = hidden.masked_fill(WEIGHTS[..., None] == 0, torch.nan)
    for got, expected in zip(results(padded), results(hidden), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_a_batch_of_weights_zero_moves_nothing(path, dtype):
    """The mean of nothing is NaN, as F.cross_entropy's with every label ignored; the gradients are
    0 in both losses, also where they are formed in the backward (float16)."""
    hidden, weight = hidden_and_head(2, 3, dtype=dtype)
    arguments = hidden, weight, two_level(211), "batchmean"
    zero = torch.zeros(2, 3, device=DEVICE)
    for value, *gradients in (
        loss_and_gradients(fused_linear_kl_div, *arguments, row_weights=zero, impl=path),
        loss_and_gradients(fused, *arguments, zero, path),
    ):
        assert value.isnan()
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_a_mean_taken_by_the_caller_over_no_weight_moves_nothing(path, reduction, rows):
    """sum / 0: the upstream gradient is infinite, and 0 * inf would be NaN in every weight."""
    hidden, weight = hidden_and_head(rows)
    weights = torch.zeros(rows, device=DEVICE)
    options = {"reduction": reduction, "impl": path, "row_weights": weights}
    loss = fused_linear_kl_div(hidden, weight, two_level(211), **options)
    (loss.sum() / weights.sum()).backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bool, torch.int64], ids=str)
def test_weights_of_any_dtype_are_summed_in_that_of_the_loss(dtype):
    """300 rows of weight 300 sum to 90,000, more than float16 has; float64 weights do not make the
    loss float64."""
    hidden, weight = (x.detach() for x in hidden_and_head(300))
    ones, weights = torch.ones(300, device=DEVICE), torch.full((300,), 300, device=DEVICE).to(dtype)
    expected = kl_div(F.linear(hidden, weight), two_level(211))
    for row_weights in (weights, ones.to(dtype)):
        for loss in (
            fused_kl_div(F.linear(hidden, weight), two_level(211), row_weights=row_weights),
            fused_linear_kl_div(hidden, weight, two_level(211), row_weights=row_weights),
        ):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)


def test_bad_weights_are_refused_by_name():
    """Another shape or device, not a tensor, or one that asks for a gradient."""
    logits, target = random_logits(2, 3, 8), two_level(8)
    hidden, weight = hidden_and_head(2, 3, vocab=8)
    for bad, message in (
        (WEIGHTS[0], r"one weight per row; got torch.float32 \(3,\)"),
        (WEIGHTS.to(torch.complex64), "real"),
        (WEIGHTS.to("meta"), "meta"),
        (2.0, "float"),
        (WEIGHTS.clone().requires_grad_(), "detach"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_kl_div(logits, target, row_weights=bad)
        with pytest.raises(ValueError, match=message):
            fused_linear_kl_div(hidden, weight, target, row_weights=bad)


def test_a_head_without_a_width_gives_level_logits():
    """C = 0, as F.linear has it: z = 0 everywhere; the gradients are empty."""
    hidden = torch.zeros(2, 3, 0, device=DEVICE, requires_grad=True)
    weight = torch.zeros(30, 0, device=DEVICE, requires_grad=True)
    loss = fused_linear_kl_div(hidden, weight, two_level(30), chunk_rows=4)
    torch.testing.assert_close(loss.detach(), torch.tensor(3.0, device=DEVICE).log())
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch 2.9 has them on CUDA only")
@pytest.mark.parametrize("has_wide_addmm", [True, False])
def test_products_that_can_return_float32_are_asked_to(has_wide_addmm, monkeypatch):
    """The calls made on CUDA, on the meta device, which has them as well: dh and dW in float32.
    On CUDA, PyTorch 2.9's addmm refuses a float32 to add to, which meta does not show."""
    module = import_module("kernels.fused_linear_kl_div")  # the package's name is the function
    monkeypatch.setattr(module, "has_wide_products", lambda _: True)
    monkeypatch.setattr(module, "HAS_WIDE_ADDMM", has_wide_addmm)
    if not has_wide_addmm:
        monkeypatch.setattr(torch, "addmm", None)
    dz, w, h = (torch.empty(s, device="meta").bfloat16() for s in ((4, 30), (30, 8), (4, 8)))
    assert _product(dz, w).dtype == torch.float32
    total = torch.empty(30, 8, device="meta")
    for first in (True, False):
        _add_product(total, dz, h, first)
    assert total.dtype == torch.float32
