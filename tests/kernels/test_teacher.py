"""The fused losses toward a teacher, tilted or not, against float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    hidden_and_head,
    in_buffer,
    loss_and_gradients,
    random_logits,
)

PATHS = ["torch", "triton"]
INF = float("inf")
TILTS = ["none", "tilt", "forbidden"]


def make_tilt(kind, vocab):
    """None; 5 on every third token, or -inf."""
    third = TwoLevelTarget(torch.arange(vocab, device=DEVICE) % 3 == 0)
    return None if kind == "none" else (third, 5.0 if kind == "tilt" else -INF)


def tilted(teacher, tilt):
    """The teacher's logits and what the tilt adds to them, in float64."""
    return teacher.double() + (0.0 if tilt is None else torch.where(tilt[0].mask, tilt[1], 0.0))


def truth(logits, teacher, tilt):
    """Loss and gradient per row in float64; a term of probability zero counts zero."""
    u = tilted(teacher, tilt)
    log_p, log_q = u.log_softmax(-1), logits.detach().double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1), log_q.exp() - p


def rows_and_gradient(path, logits, teacher, tilt=None):
    """Loss per row, and the gradient of the logits for an upstream of ones."""
    leaf = logits.detach().requires_grad_()
    loss = fused_kl_div(leaf, TeacherTarget(teacher, tilt), "none", impl=path)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), leaf.grad


def assert_exact(path, logits, teacher, tilt=None):
    """Loss and gradient against float64, to float32's rounding and that of the result."""
    loss, gradient = rows_and_gradient(path, logits, teacher, tilt)
    exact_loss, exact_gradient = truth(logits, teacher, tilt)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    rounding = 0 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5 + rounding, atol=2e-6)
    return loss, gradient


ROWS = {"spread of 10": (4, 50257, 10.0), "spread of 3": (1, 1 << 21, 3.0)}


@pytest.mark.parametrize("kind", TILTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("path", PATHS)
def test_real_looking_logits_are_exact_to_2e_6(path, rows, kind):
    """torch_kl_div (3) (4), triton_teacher (1) (2) (3) (4) (5) (6) (7): float32, level near
    -80, student and teacher apart and close; the gradient relative to softmax(z) by the norm, the
    loss above 1 nat. The longest rows show what sums the exponentials."""
    *shape, spread = ROWS[rows]
    teacher = random_logits(*shape, scale=spread) - 80
    tilt = make_tilt(kind, shape[-1])
    for noise in (0.1, 10.0):
        logits = teacher + random_logits(*shape, seed=1, scale=noise)
        loss, gradient = rows_and_gradient(path, logits, teacher, tilt)
        exact_loss, exact_gradient = truth(logits, teacher, tilt)
        assert ((loss - exact_loss).abs() <= 2e-6 * exact_loss.clamp_min(1)).all()
        assert (gradient - exact_gradient).norm() <= 2e-6 * logits.double().softmax(-1).norm()


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_student_and_teacher_may_differ_in_dtype(path, dtypes):
    """Every pair, tilted or not, on short and awkward shapes: against float64."""
    for kind, shape in zip([*TILTS, "tilt"], [(3, 2), (2, 3, 7), (127,), (0, 40)], strict=True):
        logits = random_logits(*shape, dtype=dtypes[0])
        teacher = random_logits(*shape, dtype=dtypes[1], seed=1)
        assert_exact(path, logits, teacher, make_tilt(kind, shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_strides_and_offsets_of_both_change_nothing_beyond_rounding(path, dtype):
    """Padded and misaligned rows, a transposed and an expanded teacher; NaN in the padding."""
    logits, teacher = (random_logits(3, 1001, dtype=dtype, seed=seed) for seed in (0, 1))
    tilt = make_tilt("tilt", 1001)
    for layout in ((1001, 1), (1002, 0), (1024, 3)):
        assert_exact(path, in_buffer(logits, *layout)[0], teacher, tilt)
        assert_exact(path, logits, in_buffer(teacher, *layout)[0], tilt)
    assert_exact(path, logits, teacher.t().contiguous().t(), tilt)
    assert_exact(path, logits, teacher[:1].expand(3, 1001), tilt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_student_equal_to_its_teacher_has_exactly_no_loss_and_no_gradient(path, dtype):
    """Bit for bit equal, near -80 and with a row partly -inf: 0, not almost 0. On CUDA PyTorch's
    path rounds its two softmaxes apart, to one unit in the last place."""
    logits = (random_logits(3, 50257, scale=10.0) - 80).to(dtype)
    logits[1, ::3] = -INF
    loss, gradient = rows_and_gradient(path, logits, logits.clone())
    rounded = 2e-7 if path == "torch" and DEVICE == "cuda" else 0.0
    assert (loss.abs() <= rounded).all()
    assert (gradient.abs() <= rounded).all()


@pytest.mark.parametrize("path", PATHS)
def test_minus_infinity_is_exact_in_the_teacher_in_the_student_and_in_both(path):
    """In t, P is 0 and costs nothing whatever z is; in z alone, the loss is infinite and the
    gradient -P, as far as P goes; over single columns and over whole tiles."""
    column = torch.arange(9001, device=DEVICE)
    for where in (column % 7 == 1, column > 100, column < 8900):
        logits, teacher = random_logits(3, 9001), random_logits(3, 9001, seed=1)
        teacher[0, where] = -INF
        teacher[1, where] = logits[1, where] = -INF
        logits[2, where] = -INF
        loss, gradient = rows_and_gradient(path, logits, teacher)
        exact_loss, exact_gradient = truth(logits, teacher, None)
        torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=2e-6)
        assert loss.isposinf().tolist() == [False, False, True]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_stay_in_their_row(path, bad):
    """In z or in t: loss and whole gradient row NaN; every other row exact."""
    for column in (0, 2, 999, 1000):
        for spoiled in (0, 1):
            rows = [random_logits(3, 1001), random_logits(3, 1001, seed=1)]
            clean = rows_and_gradient(path, *rows)
            rows[spoiled][1, column] = bad
            loss, gradient = rows_and_gradient(path, *rows)
            assert loss[1].isnan()
            assert gradient[1].isnan().all()
            for got, expected in zip((loss, gradient), clean, strict=True):
                assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_the_tilted_probability_is_that_of_the_closed_form():
    """With m the teacher's probability on the tokens, the target's is m e^G / (1 - m + m e^G)."""
    teacher, tilt = random_logits(5, 300), make_tilt("tilt", 300)
    p = TeacherTarget(teacher, tilt).whole_logits(torch.float64).softmax(-1)
    m = teacher.double().softmax(-1)[:, tilt[0].index].sum(-1)
    times = m * torch.tensor(5.0, dtype=torch.float64, device=DEVICE).exp()
    torch.testing.assert_close(p[:, tilt[0].index].sum(-1), times / (1 - m + times))


@pytest.mark.parametrize("kind", TILTS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_the_fused_head_computes_the_teachers_logits_by_chunks(path, reduction, kind):
    """Loss and both gradients against float64; a teacher of another width."""
    hidden, weight = hidden_and_head(2, 5)
    teacher_hidden, teacher_weight = random_logits(2, 5, 9, seed=3), random_logits(211, 9, seed=4)
    tilt = make_tilt(kind, 211)
    upstream = random_logits(2, 5, seed=5) if reduction == "none" else None
    target = TeacherTarget.from_hidden(teacher_hidden, teacher_weight, tilt)
    options = {"chunk_rows": 4, "impl": path}
    got = loss_and_gradients(
        fused_linear_kl_div, hidden, weight, target, reduction, upstream=upstream, **options
    )
    teacher = F.linear(teacher_hidden.double(), teacher_weight.double())
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = truth_of_head(h, w, teacher, tilt, reduction)
    up = None if upstream is None else upstream.double()
    exact = loss.detach(), *torch.autograd.grad(loss, (h, w), up)
    for mine, true in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=1e-6)


def truth_of_head(hidden, weight, teacher, tilt, reduction):
    """The definition, with whole logits, in which -inf in the teacher costs nothing."""
    log_q = F.linear(hidden, weight).log_softmax(-1)
    log_p = tilted(teacher, tilt).log_softmax(-1)
    loss = torch.where(log_p > -INF, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    return loss if reduction == "none" else loss.mean()


def test_the_reference_takes_a_teacher_of_either_kind():
    """F.kl_div(log_softmax(z), log_softmax(u), log_target=True), given logits or hidden states."""
    hidden, weight = random_logits(4, 9, seed=3), random_logits(211, 9, seed=4)
    logits, tilt = random_logits(4, 211), make_tilt("tilt", 211)
    teacher = F.linear(hidden, weight)
    expected = F.kl_div(
        logits.double().log_softmax(-1),
        tilted(teacher, tilt).log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    for target in (TeacherTarget(teacher, tilt), TeacherTarget.from_hidden(hidden, weight, tilt)):
        torch.testing.assert_close(kl_div(logits, target, "none"), expected.sum(-1).float())


def test_the_definition_too_lets_a_tilt_forbid_tokens():
    """P = 0 on tokens at -inf costs nothing; loss and gradient in float64."""
    logits, teacher = random_logits(3, 211).requires_grad_(), random_logits(3, 211, seed=1)
    tilt = make_tilt("forbidden", 211)
    loss = kl_div(logits, TeacherTarget(teacher, tilt), "none")
    exact_loss, exact_gradient = truth(logits, teacher, tilt)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)
