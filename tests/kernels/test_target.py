"""What targets hold, and what flows to them; the reference against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, hidden_and_head, random_logits, two_level


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
