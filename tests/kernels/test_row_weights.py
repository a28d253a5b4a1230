"""row_weights in both losses, and rows that count nothing."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    LOSSES,
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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_scale_their_rows_and_the_mean_divides_by_their_sum(name, path, reduction, dtype):
    """Values and both gradients, against the definition; a mask is a weight too, and none is 1."""
    weights, target = dtype and WEIGHTS.to(dtype), two_level(211, 2.0, 1.0)
    all_weights = torch.ones_like(WEIGHTS) if weights is None else weights.float()
    hidden, weight = hidden_and_head(2, 3)
    upstream = random_logits(2, 3, seed=5) if reduction == "none" else None
    arguments = hidden, weight, target, reduction
    expected = loss_and_gradients(weighted, *arguments, all_weights, upstream=upstream)
    options = {"impl": path, "row_weights": weights, "upstream": upstream}
    results = loss_and_gradients(LOSSES[name], *arguments, **options)
    for got, its in zip(results, expected, strict=True):
        torch.testing.assert_close(got, its, rtol=2e-5, atol=1e-6)
    assert (results[1][all_weights == 0] == 0).all()


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
@pytest.mark.parametrize("leading", [(2, 3), (2, 0)])
@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_weights_zero_or_of_no_rows_moves_nothing(name, path, leading, dtype):
    """The mean of nothing is NaN, as F.cross_entropy's with every label ignored; so is one that the
    caller takes, whose upstream gradient is infinite. The gradients are 0, also where they are
    formed in the backward (float16)."""
    inputs, zero = hidden_and_head(*leading, dtype=dtype), torch.zeros(leading, device=DEVICE)
    for weights in [zero] if zero.numel() else [zero, None]:
        for reduction in ("batchmean", "sum", "none"):
            options = {"row_weights": weights, "impl": path}
            loss = LOSSES[name](*inputs, two_level(211), reduction, **options)
            if reduction == "batchmean":
                assert loss.isnan()
            else:
                assert torch.equal(loss, zero if reduction == "none" else zero.sum())
                loss = loss.sum() / zero.sum()
            for gradient, x in zip(torch.autograd.grad(loss, inputs), inputs, strict=True):
                assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_any_dtype_are_summed_in_that_of_the_loss(name, dtype):
    """300 rows of weight 300 sum to 90,000, more than float16 has; float64 weights do not make the
    loss float64."""
    hidden, weight = (x.detach() for x in hidden_and_head(300))
    weights = torch.full((300,), 300, device=DEVICE).to(dtype)
    loss = LOSSES[name](hidden, weight, two_level(211), row_weights=weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_div(F.linear(hidden, weight), two_level(211)))
