"""Targets that are teachers within PyTorch: compile, opcheck, inference mode, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div
from kernels.fused_kl_div import OPERATORS
from kernels.fused_linear_kl_div import OPERATORS as LINEAR
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, FUSED, hidden_and_head, random_logits
from tests.kernels.test_teacher import INF, TILTS, make_tilt


@pytest.mark.parametrize("kind", TILTS)
@pytest.mark.parametrize("path", FUSED)
def test_the_operators_pass_opcheck(path, kind):
    """Schema, fake kernels, AOT dispatch with dynamic shapes; derivatives pass gradcheck."""
    logits, upstream = random_logits(3, 40), random_logits(3, seed=1)
    target = TeacherTarget(random_logits(3, 40, seed=2), make_tilt(kind, 40))
    parts = *target.parts, path
    forward, backward, backward_ = OPERATORS["teacher"]
    opcheck(forward, (logits, *parts))
    _, *of_rows = forward(logits, *parts)
    opcheck(backward, (logits, *of_rows, upstream, *parts))
    opcheck(backward_, (logits, *of_rows, upstream, *parts))
    hidden, weight = (x.detach() for x in hidden_and_head(3, vocab=40))
    teacher_hidden, teacher_weight = random_logits(3, 5, seed=2), random_logits(40, 5, seed=3)
    target = TeacherTarget.from_hidden(teacher_hidden, teacher_weight, make_tilt(kind, 40))
    options = True, True, 2, logits.dtype, *target.parts, path
    opcheck(LINEAR["teacher"], (hidden, weight, upstream, *options))
    if path == "torch":
        teacher = TeacherTarget(random_logits(3, 40, seed=2).double(), make_tilt(kind, 40))
        double = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: fused_kl_div(z, teacher, "none"), double)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("path", FUSED)
def test_a_compiled_loss_is_one_graph_and_the_same(path, inplace):
    """torch.compile(fullgraph=True, dynamic=True), the teacher's logits made inside the graph."""
    head = random_logits(133, 8, seed=1)

    def loss(hidden, teacher_hidden):
        target = TeacherTarget(F.linear(teacher_hidden, head))
        return fused_kl_div(F.linear(hidden, head), target, inplace_backward=inplace, impl=path)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        hidden = random_logits(rows, 8).requires_grad_()
        teacher_hidden = random_logits(rows, 8, seed=2)
        got, expected = (f(hidden, teacher_hidden) for f in (compiled, loss))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, hidden)[0] for value in (got, expected))
        )


def test_a_teacher_run_in_inference_mode_trains_a_student():
    """Autograd refuses to save inference tensors: the target has copies."""
    hidden, weight = hidden_and_head(3)
    with torch.inference_mode():
        teacher_hidden, tilt = hidden * 2, make_tilt("tilt", 211)
        logits = TeacherTarget(F.linear(teacher_hidden, weight), tilt)
        by_chunks = TeacherTarget.from_hidden(teacher_hidden, weight.detach(), tilt)
    for target in (logits, by_chunks):
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
    tilted_teacher = TeacherTarget(t, (make_tilt("tilt", 211)[0], strength))
    for target in (by_chunks, tilted_teacher):
        fused_linear_kl_div(hidden, weight, target).backward()
    for loss in (fused_kl_div, kl_div):
        loss(F.linear(hidden, weight), tilted_teacher).backward()
    assert (head.grad, t.grad, strength.grad) == (None, None, None)
    assert (
        not tilted_teacher.parts.logits.requires_grad
    )  # nor does it keep the teacher's graph alive
    detached = TeacherTarget.from_hidden(hidden.detach() * 2, head.detach())
    torch.testing.assert_close(
        *(fused_linear_kl_div(hidden, weight, p) for p in (by_chunks, detached))
    )


def test_bad_teachers_are_refused_by_name():
    """Every message says what was got and what was expected."""
    logits, tokens = random_logits(2, 8), make_tilt("tilt", 8)[0]
    hidden, weight = random_logits(2, 3), random_logits(8, 3)
    refused = [
        (TypeError, "floating-point", lambda: TeacherTarget(logits.long())),
        (TypeError, r"\(\.\.\., V\)", lambda: TeacherTarget(logits.sum())),
        (TypeError, r"tilt must be \(TwoLevelTarget, G\)", lambda: TeacherTarget(logits, tokens)),
        (TypeError, "tilt must be", lambda: TeacherTarget(logits, (tokens.mask, 5.0))),
        (TypeError, "tilt must be", lambda: TeacherTarget(logits, (tokens, "5"))),
        (ValueError, "the tilt must be of 7", lambda: TeacherTarget(logits[:, 1:], (tokens, 5.0))),
        (ValueError, "below \\+inf", lambda: TeacherTarget(logits, (tokens, INF))),
        (ValueError, "below \\+inf", lambda: TeacherTarget(logits, (tokens, float("nan")))),
        (ValueError, "a tensor \\(\\)", lambda: TeacherTarget(logits, (tokens, logits[0]))),
        (ValueError, r"weight \(V, C\)", lambda: TeacherTarget.from_hidden(hidden, weight.t())),
        (ValueError, "on one device", lambda: TeacherTarget.from_hidden(hidden, weight.to("meta"))),
        (
            ValueError,
            "must fit",
            lambda: fused_kl_div(logits[:, :7], TeacherTarget(logits)),
        ),
        (
            ValueError,
            "for fused_linear_kl_div",
            lambda: fused_kl_div(logits, TeacherTarget.from_hidden(hidden, weight)),
        ),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
