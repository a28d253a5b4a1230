"""Both losses: upstream gradients, weights of rows, other derivatives and torch.func."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.fused_kl_div import launchers
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    LOSSES,
    PATHS,
    TARGETS,
    hidden_and_head,
    loss_and_gradients,
    make_target,
    random_logits,
    rows_and_gradient,
    truth,
    two_level,
    unfused_linear,
)

VOCAB = 133
HEAD = random_logits(30, 8, seed=1)
WEIGHTS = torch.tensor([[1.0, 0.0, 2.5], [0.0, 1.0, 0.5]], device=DEVICE)


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


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("path", FUSED)
def test_any_upstream_gradient_scales_both_gradients_of_the_head_as_often_as_asked(path, reduction):
    """Times -2.5, 0 and 1; a second backward computes again what the first has scaled in place."""
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


@pytest.mark.parametrize("path", [*FUSED, "linear"])
def test_gradient_of_a_float16_loss_survives_a_scaled_upstream(path):
    """A gradient scaler's 65,536 enters before the one rounding to float16, not after it: against
    float64. The unscaled gradient is below float16's smallest normal number, 6e-5. "linear"
    multiplies by the identity."""
    logits = random_logits(4, 4096, dtype=torch.float16).requires_grad_()
    target = TwoLevelTarget(torch.arange(4096, device=DEVICE) < 8)
    if path == "linear":
        loss = fused_linear_kl_div(logits, torch.eye(4096, device=DEVICE).half(), target)
    else:
        loss = fused_kl_div(logits, target, impl=path)
    (loss * 65536).backward()
    _, exact = truth(logits, target)
    torch.testing.assert_close(logits.grad.double(), exact * 16384, rtol=1e-3, atol=1e-7)


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


@pytest.mark.parametrize("path", FUSED)
def test_inplace_backward_writes_the_gradient_over_the_logits(path):
    """The same gradient as without it, which leaves them and their version alone; a second backward
    or derivative raises, as the logits are gone."""
    leaf, target = random_logits(2, 3, VOCAB).requires_grad_(), two_level(VOCAB, 2.0, 1.0)
    (expected,) = torch.autograd.grad(fused_kl_div(leaf, target, impl=path), leaf)
    assert torch.equal(leaf, random_logits(2, 3, VOCAB))
    assert leaf._version == 0
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
    """Transposed, expanded, overlapping, and rows at no single stride: the copy is overwritten."""
    base = random_logits(4, 6, 6)
    overlapping = base[0, :3].flatten().unfold(0, 6, 2)
    for view in (base.transpose(1, 2), base[0, :1].expand(3, 6), base[:, :-1], overlapping):
        leaf, before = view.detach().requires_grad_(), view.clone()
        fused_kl_div(leaf, two_level(6), inplace_backward=True).backward()
        assert torch.equal(view, before)
        _, exact = truth(before, two_level(6))
        torch.testing.assert_close(leaf.grad.double(), exact / exact[..., 0].numel())


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_pass_gradcheck_and_second_ones_are_refused(name, reduction, kind):
    """In float64, by finite differences; then a second derivative raises, and names the function
    that has it."""
    inputs = [x.detach().double().requires_grad_() for x in hidden_and_head(2, 3, vocab=11)]
    target = make_target(kind, (2, 3, 11))

    def loss(*inputs):
        return LOSSES[name](*inputs, target, reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    for gradient in torch.autograd.grad(loss(*inputs).sum(), inputs, create_graph=True):
        with pytest.raises(RuntimeError, match=r"use kernels\.reference\.kl_div"):
            torch.autograd.grad(gradient.sum(), inputs, retain_graph=True)


def test_gradients_of_the_head_come_only_where_they_are_asked_for(monkeypatch):
    """For hidden states alone, for the head alone; for neither, the loss's backward never runs."""
    hidden, weight = hidden_and_head(9)
    target = two_level(211)
    _, grad_hidden, grad_weight = loss_and_gradients(unfused_linear, hidden, weight, target)
    loss = fused_linear_kl_div(hidden, weight.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad_hidden)
    loss = fused_linear_kl_div(hidden.detach(), weight, target)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], grad_weight)
    monkeypatch.setattr(launchers("torch", hidden.device), "backward", None)
    fused_linear_kl_div(hidden.detach(), weight.detach(), target, impl="torch")
    with torch.no_grad():
        assert not fused_linear_kl_div(hidden, weight, target, impl="torch").requires_grad


def of_hidden(name):
    """The loss as torch.func takes it, a function of the hidden states."""
    target = two_level(30, 2.0, 1.0)
    return lambda h, reduction="batchmean": LOSSES[name](h, HEAD, target, reduction)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOSSES)
def test_grad_vmap_and_jacrev_agree_with_autograd(name):
    """torch.func.grad; vmap over single rows, of the loss and of its grad; jacrev over rows."""
    loss, hidden = of_hidden(name), random_logits(3, 8).requires_grad_()
    rows = loss(hidden, "none")
    (expected,) = torch.autograd.grad(rows.sum(), hidden)
    hidden = hidden.detach()
    torch.testing.assert_close(torch.func.grad(loss)(hidden) * 3, expected)
    torch.testing.assert_close(torch.func.vmap(loss)(hidden), rows)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(hidden), expected)
    jacobian = torch.func.jacrev(lambda x: loss(x, "none"))(hidden)
    torch.testing.assert_close(jacobian.sum(0), expected)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(hidden)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_in_one_line(name):
    """jvp and a dual tensor: an operator would drop the tangent and return 0."""
    loss, hidden = of_hidden(name), random_logits(3, 8)
    message = "^You must implement the jvp function.*forward mode AD.$"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(loss, (hidden,), (hidden,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        loss(forward_ad.make_dual(hidden, hidden))
