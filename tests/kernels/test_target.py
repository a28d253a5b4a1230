"""TwoLevelTarget: normalisation, copies, refusals; and the reference against closed forms."""

import math

import pytest
import torch

from kernels import TwoLevelTarget
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, random_logits, two_level


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
