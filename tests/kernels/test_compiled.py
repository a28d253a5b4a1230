"""Both losses under torch.compile: without gradients, and with numbers that change."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from tests.kernels.kl_cases import DEVICE, hidden_and_head, random_logits, two_level

MASK = torch.arange(211, device=DEVICE) % 3 == 0
LOSSES = {
    "fused_kl_div": lambda h, w, target: fused_kl_div(F.linear(h, w), target),
    "fused_linear_kl_div": fused_linear_kl_div,
}


@pytest.fixture(autouse=True)
def nothing_is_compiled_before():
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_needs_no_gradient(name, fullgraph):
    """As in an evaluation: under no_grad, and of tensors that ask for none."""
    hidden, weight = hidden_and_head(3)
    compiled = torch.compile(LOSSES[name], fullgraph=fullgraph, backend="aot_eager")
    for target in (two_level(211), TeacherTarget(random_logits(3, 211), (two_level(211), 2.0))):
        expected = LOSSES[name](hidden, weight, target).detach()
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden, weight, target), expected)
        got = compiled(hidden.detach(), weight.detach(), target)
        torch.testing.assert_close(got, expected)


def with_levels(value):
    return TwoLevelTarget(MASK, 1.0, value / 10)


def with_tilt(value):
    return TeacherTarget(random_logits(3, 211), (two_level(211), value))


def with_tilt_tensor(value):
    return with_tilt(torch.tensor(value, device=DEVICE))


@pytest.mark.parametrize("make", [with_levels, with_tilt, with_tilt_tensor])
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_of_a_target_that_change_compile_nothing_again(name, make):
    """alpha, beta and G are data: six values, no graph after the first, each with its own loss and
    gradient."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[name], backend=counter)
    hidden, weight = hidden_and_head(3)
    graphs = None
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        losses = [loss(hidden, weight, make(value)) for loss in (compiled, LOSSES[name])]
        graphs = graphs or counter.frame_count
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))
    assert counter.frame_count == graphs


def test_a_tilt_that_is_made_inside_the_graph_may_change():
    """G as a tensor, an argument of the compiled function: one graph. (A Python number would be
    compiled anew for each value: torch.compile makes constants of those.)"""
    counter = CompileCounterWithBackend("aot_eager")
    tokens = two_level(211)

    def loss(z, t, strength):
        return fused_kl_div(z, TeacherTarget(t, (tokens, strength)))

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    z, t = random_logits(3, 211).requires_grad_(), random_logits(3, 211, seed=1)
    for value in (0.5, 1.0, 1.5, 2.0):
        strength = torch.tensor(value, device=DEVICE)
        torch.testing.assert_close(compiled(z, t, strength), loss(z, t, strength))
    assert counter.frame_count == 1
