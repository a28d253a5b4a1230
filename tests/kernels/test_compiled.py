"""Both losses under torch.compile and on the meta device; their operators under opcheck."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from kernels import TeacherTarget, TwoLevelTarget
from kernels.fused_kl_div import OPERATORS
from kernels.fused_linear_kl_div import OPERATORS as LINEAR
from kernels.fused_linear_kl_div import scale_
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    LOSSES,
    hidden_and_head,
    loss_and_gradients,
    make_target,
    random_logits,
    two_level,
)


@pytest.fixture(autouse=True)
def nothing_is_compiled_before():
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_needs_no_gradient(name, fullgraph):
    """As in an evaluation: under no_grad, and of tensors that ask for none."""
    hidden, weight = hidden_and_head(3)
    compiled = torch.compile(LOSSES[name], fullgraph=fullgraph, backend="aot_eager")
    for target in (two_level(211), make_target("tilted teacher", (3, 211))):
        expected = LOSSES[name](hidden, weight, target).detach()
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden, weight, target), expected)
        got = compiled(hidden.detach(), weight.detach(), target)
        torch.testing.assert_close(got, expected)


OPTIONS = {
    "fused_kl_div": [{}, {"inplace_backward": True}],
    "fused_linear_kl_div": [{}, {"reduction": "none"}],
}


@pytest.mark.parametrize(("path", "dynamic"), [("torch", None), ("triton", True)])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LOSSES for options in OPTIONS[name]]
)
def test_a_compiled_loss_is_one_graph_and_the_same(name, options, path, dynamic):
    """torch.compile(fullgraph=True) against eager, for three shapes: loss and both gradients, with
    a teacher that is made inside the graph where all shapes are dynamic."""
    target = two_level(211, 2.0, 1.0)

    def loss(hidden, weight):
        p = TeacherTarget(F.linear(hidden.detach() + 1, weight.detach())) if dynamic else target
        return LOSSES[name](hidden * 2, weight, p, impl=path, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for leading in ((6,), (9,), (2, 4))[: 3 if dynamic else 2]:
        inputs = hidden_and_head(*leading)
        for got, expected in zip(
            loss_and_gradients(compiled, *inputs), loss_and_gradients(loss, *inputs), strict=True
        ):
            torch.testing.assert_close(got, expected)


TEACHER, TOKENS = random_logits(3, 211), two_level(211)
NUMBERS = {  # what is made of a number outside the graph, and the target that is made of it inside
    "levels": (lambda value: TwoLevelTarget(TOKENS.mask, 1.0, value / 10), lambda target: target),
    "tilt": (lambda value: TeacherTarget(TEACHER, (TOKENS, value)), lambda target: target),
    "tilt in the graph": (
        lambda value: torch.tensor(value, device=DEVICE),
        lambda strength: TeacherTarget(TEACHER, (TOKENS, strength)),
    ),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_of_a_target_that_change_compile_nothing_again(name, kind):
    """alpha, beta and G are data: six values, no graph after the first, each with its own loss and
    gradient. (A Python number in the graph is compiled anew: torch makes a constant of it.)"""
    outside, inside = NUMBERS[kind]

    def eager(hidden, weight, made):
        return LOSSES[name](hidden, weight, inside(made))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    hidden, weight = hidden_and_head(3)
    graphs = None
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        losses = [loss(hidden, weight, outside(value)) for loss in (compiled, eager)]
        graphs = graphs or counter.frame_count
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LOSSES for options in OPTIONS[name]]
)
def test_a_loss_on_the_meta_device_has_shapes_and_no_data(name, options):
    """Forward and backward read no data."""
    inputs = [x.detach().bfloat16().to("meta").requires_grad_() for x in hidden_and_head(2, 3)]
    loss = LOSSES[name](*inputs, two_level(211).to("meta"), **options)
    assert (loss.device.type, loss.dtype) == ("meta", torch.float32)
    loss.sum().backward()
    for x in inputs:
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("kind", ["target tokens", "target tokens and beta", "teacher", "tilted"])
@pytest.mark.parametrize("path", FUSED)
def test_the_operators_pass_opcheck(path, kind):
    """Schemas, fake kernels, AOT dispatch with dynamic shapes; autograd is above the operators."""
    logits, upstream = random_logits(3, 40), random_logits(3, seed=1)
    tilt = (two_level(40), 2.0) if kind == "tilted" else None
    target = linear = make_target(kind, (3, 40)) if "tokens" in kind else None
    if target is None:
        target = TeacherTarget(random_logits(3, 40, seed=2), tilt)
        teacher = random_logits(3, 5, seed=2), random_logits(40, 5, seed=3)
        linear = TeacherTarget.from_hidden(*teacher, tilt)
    parts = *target.parts, path
    forward, backward, backward_ = OPERATORS[target.kind]
    opcheck(forward, (logits, *parts))
    _, *of_rows = forward(logits, *parts)
    torch.testing.assert_close(of_rows[0], logits.logsumexp(-1))
    opcheck(backward, (logits, *of_rows, upstream, *parts))
    opcheck(backward_, (logits, *of_rows, upstream, *parts))
    hidden, weight = (x.detach() for x in hidden_and_head(3, vocab=40))
    for flags in ((True, True), (True, False), (False, False)):
        options = *flags, 2, torch.float32, *linear.parts, path
        opcheck(LINEAR[linear.kind], (hidden, weight, upstream, *options))
        _, *gradients = LINEAR[linear.kind](hidden, weight, upstream, *options)
        assert [x.numel() > 0 for x in gradients] == list(flags)
    opcheck(scale_, (upstream, torch.tensor(2.0, device=DEVICE), path))
