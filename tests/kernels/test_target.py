"""Targets: what they hold, what flows to them, and what they and both losses refuse, by name. The
reference against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, LOSSES, hidden_and_head, random_logits, two_level


@pytest.mark.parametrize("weights", [(1.0, 0.0), (3.0, 1.0), (1e308, 1e-300), (5e-324, 0.0)])
def test_levels_are_probabilities(weights):
    """They sum to 1 and keep their ratio; no weight is too large or too small."""
    target = two_level(1000, *weights)
    dense = target.dense(torch.float64)
    assert math.isclose(dense.sum().item(), 1.0, rel_tol=1e-12)
    assert math.isclose(target.beta / target.alpha, weights[1] / weights[0], abs_tol=1e-300)
    assert torch.equal(dense == target.alpha, target.mask)
    assert target.dense().dtype == torch.float32
    assert torch.equal(target.index, target.mask.nonzero().squeeze(1))
    assert (target.size, target.vocab_size) == (334, 1000)


def test_a_target_on_another_device_is_the_same():
    """A copy, made without counting the target tokens there: the meta device has no data."""
    target = two_level(30, 2.0, 1.0)
    there = target.to("meta")
    assert target.to(torch.device("meta")) is there
    assert {x.device.type for x in there.parts} == {there.mask.device.type} == {"meta"}
    assert (there.size, there.alpha, there.beta) == (10, target.alpha, target.beta)
    assert not target.mask.is_meta


def test_the_callers_mask_may_change_afterwards():
    """The target has a copy."""
    mask = torch.arange(30, device=DEVICE) < 5
    target = TwoLevelTarget(mask)
    mask.fill_(True)
    assert target.mask.sum() == (target.dense() > 0).sum() == 5


def test_the_reference_is_the_divergence_that_torch_distributions_computes():
    """torch.distributions.kl_divergence of two categoricals, in float64. The mean is over all rows:
    F.kl_div's own of (B, T, V) divides by B alone, T times too much."""
    logits, target = random_logits(3, 5, 40).double(), two_level(40, 2.0, 1.0)
    p = torch.distributions.Categorical(probs=target.dense(torch.float64))
    expected = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=logits))
    torch.testing.assert_close(kl_div(logits, target, "none"), expected)
    torch.testing.assert_close(kl_div(logits, target, "sum"), expected.sum())
    torch.testing.assert_close(kl_div(logits, target), expected.sum() / 15)


def test_the_tilted_probability_is_that_of_the_closed_form():
    """With m the teacher's probability on the tokens, the target's is m e^G / (1 - m + m e^G)."""
    teacher, tokens = random_logits(5, 300), two_level(300)
    p = TeacherTarget(teacher, (tokens, 5.0)).whole_logits(torch.float64).softmax(-1)
    m = teacher.double().softmax(-1)[:, tokens.index].sum(-1)
    times = m * math.exp(5)
    torch.testing.assert_close(p[:, tokens.index].sum(-1), times / (1 - m + times))


def test_a_teacher_run_in_inference_mode_trains_a_student():
    """Autograd refuses to save inference tensors: the target has copies."""
    hidden, weight = hidden_and_head(3)
    with torch.inference_mode():
        tilt = two_level(211), 5.0
        teacher_hidden = hidden * 2
        logits = TeacherTarget(F.linear(teacher_hidden, weight), tilt)
        by_chunks = TeacherTarget.from_hidden(teacher_hidden, weight.detach(), tilt)
    for target in (logits, by_chunks, tilt[0]):
        fused_linear_kl_div(hidden, weight, target).backward()
    fused_kl_div(F.linear(hidden, weight), logits).backward()


def test_no_gradient_flows_to_a_teacher():
    """Its head is a Parameter, as under `with torch.no_grad()` in everybody's distillation, its
    logits and G ask for gradients: the target detaches them, and the loss is that of the detached
    ones."""
    hidden, weight = hidden_and_head(3)
    head = torch.nn.Parameter(random_logits(211, 16, seed=4))
    with torch.no_grad():
        by_chunks = TeacherTarget.from_hidden(hidden * 2, head)
    t = random_logits(3, 211, seed=2).requires_grad_()
    strength = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    tilted_teacher = TeacherTarget(t, (two_level(211), strength))
    for target in (by_chunks, tilted_teacher):
        fused_linear_kl_div(hidden, weight, target).backward()
    for loss in (fused_kl_div, kl_div):
        loss(F.linear(hidden, weight), tilted_teacher).backward()
    assert (head.grad, t.grad, strength.grad) == (None, None, None)
    assert not tilted_teacher.parts.logits.requires_grad  # nor is the teacher's graph kept alive
    detached = TeacherTarget.from_hidden(hidden.detach() * 2, head.detach())
    torch.testing.assert_close(
        *(fused_linear_kl_div(hidden, weight, p) for p in (by_chunks, detached))
    )


SOME = torch.arange(10) < 3
TOKENS, EVEN = two_level(8), torch.full((8,), 1 / 8, device=DEVICE)
T = random_logits(2, 8)
H, W = random_logits(2, 3), random_logits(8, 3)
WEIGHTS = torch.ones(2, device=DEVICE)
from_hidden = TeacherTarget.from_hidden

CALLS = [
    (TypeError, "bool", lambda: TwoLevelTarget(SOME.float())),
    (TypeError, r"got list; .*index_fill", lambda: TwoLevelTarget([1, 2, 3])),
    (TypeError, r"\(V,\), got torch.bool \(1, 10\)", lambda: TwoLevelTarget(SOME[None])),
    (ValueError, "got 0 of 10", lambda: TwoLevelTarget(SOME & False)),
    (ValueError, "got 10 of 10", lambda: TwoLevelTarget(SOME | True)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, 1.0, 1.0)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, 1.0, -0.1)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, math.nan, 0.0)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, math.inf, 0.0)),
    (TypeError, "floating-point", lambda: TeacherTarget(T.long())),
    (TypeError, r"\(\.\.\., V\)", lambda: TeacherTarget(T.sum())),
    (TypeError, r"tilt must be \(TwoLevelTarget, G\)", lambda: TeacherTarget(T, TOKENS)),
    (TypeError, "tilt must be", lambda: TeacherTarget(T, (TOKENS.mask, 5.0))),
    (TypeError, "tilt must be", lambda: TeacherTarget(T, (TOKENS, "5"))),
    (ValueError, "the tilt must be of 7", lambda: TeacherTarget(T[:, 1:], (TOKENS, 5.0))),
    (ValueError, r"below \+inf", lambda: TeacherTarget(T, (TOKENS, math.inf))),
    (ValueError, r"below \+inf", lambda: TeacherTarget(T, (TOKENS, math.nan))),
    (ValueError, r"a tensor \(\)", lambda: TeacherTarget(T, (TOKENS, T[0]))),
    (TypeError, "the teacher's weight", lambda: from_hidden(H, [W])),
    (ValueError, "for fused_linear_kl_div", lambda: fused_kl_div(T, from_hidden(H, W))),
    (
        ValueError,
        "the teacher's hidden must be .* autocast .* got torch.bfloat16",
        lambda: fused_linear_kl_div(H, W, from_hidden(H.bfloat16(), W)),
    ),
    (ValueError, r"weight \(V, C\)", lambda: fused_linear_kl_div(H, W.t(), TOKENS)),
    (ValueError, "got torch.bfloat16", lambda: fused_linear_kl_div(H.bfloat16(), W, TOKENS)),
    (TypeError, "floating-point", lambda: fused_linear_kl_div(H.long(), W, TOKENS)),
    (ValueError, "chunk_rows", lambda: fused_linear_kl_div(H, W, TOKENS, chunk_rows=0)),
    (ValueError, "chunk_rows", lambda: fused_linear_kl_div(H, W, TOKENS, chunk_rows=2.5)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div(T.long(), TOKENS)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div([[0.0]], TOKENS)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div(T.sum(), TOKENS)),
    (ValueError, 'pass "batchmean"', lambda: kl_div(T, TOKENS, "mean")),
]


@pytest.mark.parametrize(("error", "message", "call"), CALLS)
def test_bad_arguments_are_refused_by_name(error, message, call):
    """Of the targets, and of one of the losses."""
    with pytest.raises(error, match=message):
        call()


FITS = r"fit logits of shape \(2, 8\)"
OF_BOTH = [  # target and options
    (ValueError, 'pass "batchmean" for the mean', TOKENS, {"reduction": "mean"}),
    (ValueError, FITS, two_level(9), {}),
    (ValueError, FITS, EVEN[None], {}),
    (ValueError, FITS, TeacherTarget(EVEN), {}),
    (ValueError, FITS, EVEN.to("meta"), {}),
    (TypeError, "TwoLevelTarget", TOKENS.mask, {}),
    (TypeError, "TwoLevelTarget", None, {}),
    (TypeError, "to_dense", T.to_sparse(), {}),
    (ValueError, "impl must be", TOKENS, {"impl": "cuda"}),
    (TypeError, "TwoLevelTarget only", EVEN, {"impl": "triton-simple"}),
    (ValueError, r"per row; got torch.float32 \(1,\)", TOKENS, {"row_weights": WEIGHTS[:1]}),
    (ValueError, "real", TOKENS, {"row_weights": WEIGHTS.to(torch.complex64)}),
    (ValueError, "meta", TOKENS, {"row_weights": WEIGHTS.to("meta")}),
    (ValueError, "float", TOKENS, {"row_weights": 2.0}),
    (ValueError, "detach", TOKENS, {"row_weights": WEIGHTS.clone().requires_grad_()}),
]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bad_arguments_of_both_losses_are_refused_by_name(loss):
    """A target that does not fit, a path that is none or cannot, bad weights of rows."""
    hidden, weight = hidden_and_head(2, vocab=8)
    for error, message, target, options in OF_BOTH:
        with pytest.raises(error, match=message):
            loss(hidden, weight, target, **options)
    with pytest.raises(TypeError, match="no float64"):
        loss(hidden.double(), weight.double(), TOKENS, impl="triton")
