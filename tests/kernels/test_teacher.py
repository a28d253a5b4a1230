"""The fused losses toward a teacher, tilted or not, against float64; what a TeacherTarget takes."""

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    FUSED,
    hidden_and_head,
    in_buffer,
    loss_and_gradients,
    random_logits,
    rows_and_gradient,
    truth,
    two_level,
)

INF = float("inf")
TILTS = {"none": None, "tilt": 5.0, "forbidden": -INF}  # on every third token


def make_teacher(teacher, kind):
    tilt = None if kind == "none" else (two_level(teacher.shape[-1]), TILTS[kind])
    return TeacherTarget(teacher, tilt)


def assert_exact(path, logits, teacher, kind="none"):
    """Loss and gradient against float64, to float32's rounding and that of the result."""
    target = make_teacher(teacher, kind)
    loss, gradient = rows_and_gradient(path, logits, target)
    exact_loss, exact_gradient = truth(logits, target)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    rounding = 0 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5 + rounding, atol=2e-6)
    return loss, gradient


ROWS = {"spread of 10": (4, 50257, 10.0), "spread of 3": (1, 1 << 21, 3.0)}


@pytest.mark.parametrize("kind", TILTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("path", FUSED)
def test_real_looking_logits_are_exact_to_2e_6(path, rows, kind):
    """torch_kl_div (3) (4), triton_teacher (1) (2) (3) (4) (5) (6) (7): float32, level near
    -80, student and teacher apart and close; the gradient relative to softmax(z) by the norm, the
    loss above 1 nat. The longest rows show what sums the exponentials."""
    *shape, spread = ROWS[rows]
    teacher = random_logits(*shape, scale=spread) - 80
    target = make_teacher(teacher, kind)
    for noise in (0.1, 10.0):
        logits = teacher + random_logits(*shape, seed=1, scale=noise)
        loss, gradient = rows_and_gradient(path, logits, target)
        exact_loss, exact_gradient = truth(logits, target)
        assert ((loss - exact_loss).abs() <= 2e-6 * exact_loss.clamp_min(1)).all()
        assert (gradient - exact_gradient).norm() <= 2e-6 * logits.double().softmax(-1).norm()


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_student_and_teacher_may_differ_in_dtype(path, dtypes):
    """Every pair, tilted or not, on short and awkward shapes: against float64."""
    for kind, shape in zip([*TILTS, "tilt"], [(3, 2), (2, 3, 7), (127,), (0, 40)], strict=True):
        logits = random_logits(*shape, dtype=dtypes[0])
        assert_exact(path, logits, random_logits(*shape, dtype=dtypes[1], seed=1), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_strides_and_offsets_of_both_change_nothing_beyond_rounding(path, dtype):
    """Padded and misaligned rows, a transposed and an expanded teacher; NaN in the padding."""
    logits, teacher = (random_logits(3, 1001, dtype=dtype, seed=seed) for seed in (0, 1))
    for layout in ((1001, 1), (1002, 0), (1024, 3)):
        assert_exact(path, in_buffer(logits, *layout)[0], teacher, "tilt")
        assert_exact(path, logits, in_buffer(teacher, *layout)[0], "tilt")
    assert_exact(path, logits, teacher.t().contiguous().t(), "tilt")
    assert_exact(path, logits, teacher[:1].expand(3, 1001), "tilt")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_a_student_equal_to_its_teacher_has_exactly_no_loss_and_no_gradient(path, dtype):
    """Bit for bit equal, near -80 and with a row partly -inf: 0, not almost 0. On CUDA PyTorch's
    path rounds its two softmaxes apart, to one unit in the last place."""
    logits = (random_logits(3, 50257, scale=10.0) - 80).to(dtype)
    logits[1, ::3] = -INF
    loss, gradient = rows_and_gradient(path, logits, TeacherTarget(logits.clone()))
    rounded = 2e-7 if path == "torch" and DEVICE == "cuda" else 0.0
    assert (loss.abs() <= rounded).all()
    assert (gradient.abs() <= rounded).all()


@pytest.mark.parametrize("path", FUSED)
def test_minus_infinity_is_exact_in_the_teacher_in_the_student_and_in_both(path):
    """In t, P is 0 and costs nothing whatever z is; in z alone, the loss is infinite and the
    gradient -P, as far as P goes; over single columns and over whole tiles."""
    column = torch.arange(9001, device=DEVICE)
    for where in (column % 7 == 1, column > 100, column < 8900):
        logits, teacher = random_logits(3, 9001), random_logits(3, 9001, seed=1)
        teacher[0, where] = -INF
        teacher[1, where] = logits[1, where] = -INF
        logits[2, where] = -INF
        loss, gradient = assert_exact(path, logits, teacher)
        assert loss.isposinf().tolist() == [False, False, True]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("path", FUSED)
def test_nan_and_infinity_in_a_teacher_stay_in_their_row(path, bad):
    """Loss and whole gradient row NaN; every other row as before."""
    logits, teacher = random_logits(3, 1001), random_logits(3, 1001, seed=1)
    clean = rows_and_gradient(path, logits, TeacherTarget(teacher))
    for column in (0, 2, 999, 1000):
        spoiled = teacher.index_put((torch.tensor(1), torch.tensor(column)), torch.tensor(bad))
        results = rows_and_gradient(path, logits, TeacherTarget(spoiled))
        for got, expected in zip(results, clean, strict=True):
            assert got[1].isnan().all()
            assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_the_tilted_probability_is_that_of_the_closed_form():
    """With m the teacher's probability on the tokens, the target's is m e^G / (1 - m + m e^G)."""
    teacher, tokens = random_logits(5, 300), two_level(300).index
    p = make_teacher(teacher, "tilt").whole_logits(torch.float64).softmax(-1)
    m = teacher.double().softmax(-1)[:, tokens].sum(-1)
    times = m * torch.tensor(5.0, dtype=torch.float64, device=DEVICE).exp()
    torch.testing.assert_close(p[:, tokens].sum(-1), times / (1 - m + times))


@pytest.mark.parametrize("kind", TILTS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_the_fused_head_computes_the_teachers_logits_by_chunks(path, reduction, kind):
    """Loss and both gradients, and the reference's loss, against float64; a teacher of another
    width."""
    hidden, weight = hidden_and_head(2, 5)
    head = random_logits(2, 5, 9, seed=3), random_logits(211, 9, seed=4)
    tilt = make_teacher(F.linear(*head), kind).tilt
    target = TeacherTarget.from_hidden(*head, tilt)
    upstream = random_logits(2, 5, seed=5) if reduction == "none" else None
    got = loss_and_gradients(
        fused_linear_kl_div, hidden, weight, target, reduction, upstream=upstream,
        chunk_rows=4, impl=path,
    )  # fmt: skip
    h, w = hidden.detach().double(), weight.detach().double()
    exact = TeacherTarget(F.linear(*(x.double() for x in head)), tilt)
    loss, dz = truth(F.linear(h, w), exact)
    dz = dz / 10 if upstream is None else dz * upstream[..., None]
    expected = (
        loss if reduction == "none" else loss.mean(),
        dz @ w,
        torch.einsum("abv,abc->vc", dz, h),
    )
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=1e-6)
    reference = kl_div(F.linear(hidden, weight), target, reduction).detach()
    torch.testing.assert_close(reference.double(), expected[0], rtol=2e-5, atol=1e-5)


def test_a_teachers_head_multiplies_in_the_dtype_of_autocast():
    """As F.linear does, to the rounding of the loss."""
    (hidden, weight), head = hidden_and_head(3), hidden_and_head(3)
    with torch.autocast(DEVICE, torch.bfloat16):
        by_chunks = fused_linear_kl_div(hidden * 2, weight, TeacherTarget.from_hidden(*head))
        whole = fused_linear_kl_div(hidden * 2, weight, TeacherTarget(F.linear(*head)))
    torch.testing.assert_close(by_chunks, whole)


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
