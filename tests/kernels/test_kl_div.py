"""The fused losses against float64: every dtype, awkward shapes, memory and values."""

import pytest
import torch

from kernels import TeacherTarget, TwoLevelTarget
from kernels.arguments import resolve_impl
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    FUSED,
    PATHS,
    TARGETS,
    TEACHERS,
    assert_as_exact,
    assert_exact,
    dense64,
    gradient_eps,
    in_buffer,
    loss_eps,
    make_target,
    random_logits,
    rows_and_gradient,
    truth,
    two_level,
)

INF = float("inf")
# More than two of the kernels' tiles (4,096), and odd. "linear" is left out here: the identity that
# stands for its LM head must be small, and makes NaN of an infinite logit (0 * inf).
VOCAB = 9001
# Vocabularies: 2 is the smallest that makes sense; 7 and 127 are shorter than any tile; 1000 is a
# multiple of 8 but not of 16. Zero to two leading dimensions; rows: none, one, a prime.
SHAPES = [(3, 2), (1, 2), (5, 7), (1, 3, 7), (0, 127), (2, 0, 127), (7, 127), (127,), (2, 1, 1000)]
CASES = [(path, kind) for path in [*FUSED, "linear"] for kind in TARGETS]
CASES += [("triton-simple", kind) for kind in TARGETS[:2]]  # it has two-level targets only


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "kind"), CASES)
def test_loss_and_gradient_are_as_exact_as_the_reference(path, kind, dtype):
    """torch_kl_div (1) (2), triton_kl_div (1) (2): against float64, on every short shape; the
    reference in the same dtype sets the bound."""
    for shape in SHAPES:
        check(path, random_logits(*shape, dtype=dtype), make_target(kind, shape))


def check(path, logits, target):
    loss, gradient = rows_and_gradient(path, logits, target)
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    reference_loss, reference_gradient = rows_and_gradient("reference", logits, target)
    exact_loss, exact_gradient = truth(logits, target)
    assert_as_exact(
        loss[..., None], reference_loss[..., None], exact_loss[..., None], loss_eps(logits)
    )
    eps = gradient_eps(logits, target, exact_gradient, path)
    assert_as_exact(gradient, reference_gradient, exact_gradient, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_rows_of_any_layout_are_read_right(path, dtype):
    """Transposed, every other column, sliced in the middle, one row expanded; padded and off a
    boundary, with NaN between the rows; so may be a teacher's: against float64, as above."""
    base = random_logits(2, 4, 6, dtype=dtype)
    views = [base.transpose(0, 2), base[..., ::2], base[:, :-1], base[:1, :1].expand(3, 2, 6)]
    for stride, offset in ((1001, 1), (1002, 0), (1024, 3)):
        views.append(in_buffer(random_logits(2, 1001, dtype=dtype), stride, offset)[0])
    for view in views[: 4 if path == "linear" else None]:  # its identity is not for 1,001 columns
        check(path, view, two_level(view.shape[-1], 2.0, 1.0))
        if path in FUSED:
            check(path, view, make_target("tilted teacher", view.shape))
            check(path, -view.contiguous(), make_target("tilted teacher", view.shape, view))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", FUSED)
def test_saturated_and_level_logits_are_exact(path, kind):
    """torch_kl_div (1) (2), triton_kl_div (3) (4) (5): +-30 at random, all equal, and a peak of 3e4
    on a target token and on another."""
    sign = torch.where(random_logits(1, VOCAB) > 0, 30.0, -30.0)
    peaks = random_logits(2, VOCAB)
    peaks[0, 3], peaks[1, 5] = 3e4, 3e4
    logits = torch.cat([sign, torch.full_like(sign, -7.25), peaks])
    assert_exact(path, logits, make_target(kind, logits.shape))


@pytest.mark.parametrize("path", FUSED)
def test_minus_infinity_where_the_target_is_zero_costs_nothing(path):
    """At single columns, at both ends of a row, and over whole tiles at its beginning, at its end
    or in between: against float64."""
    column = torch.arange(VOCAB, device=DEVICE)
    supports = [column % 7 > 0, (column >= 50) & (column < VOCAB - 50)]
    supports += [column >= 8500, column < 300, (column < 50) | (column > 8950)]
    for support in supports:
        logits = random_logits(1, VOCAB).masked_fill(~support, -INF)
        target = TwoLevelTarget(support & (column % 3 == 0))
        loss, gradient = assert_exact(path, logits, target)
        assert loss.isfinite().all()
        assert (gradient[logits == -INF] == 0).all()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", ["reference", *FUSED])
def test_minus_infinity_where_the_target_is_positive_gives_infinity(path, kind):
    """Only that row's loss is infinite; its gradient is finite, and -P there: against float64."""
    logits = random_logits(3, 1001)
    logits[1, 300] = -INF  # a target token, and positive in the dense targets
    target = make_target(kind, logits.shape)
    _, gradient = assert_exact(path, logits, target)
    assert truth(logits, target)[0].isposinf().tolist() == [False, True, False]
    p = dense64(target).expand(logits.shape)[1, 300]
    torch.testing.assert_close(gradient[1, 300].double(), -p, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("kind", [*TARGETS, "teacher"])
@pytest.mark.parametrize("path", ["reference", *FUSED])
def test_nan_and_infinity_stay_in_their_row(path, kind, bad):
    """In the logits, or in those of a teacher. The row's loss and whole gradient are NaN, as in the
    reference; other rows do not change."""
    logits, teacher = random_logits(3, 1001), random_logits(3, 1001, seed=1)
    clean = rows_and_gradient(path, logits, make_target(kind, logits.shape))
    spoiled = teacher if kind == "teacher" else logits
    for column in (0, 2, 999, 1000):
        kept, spoiled[1, column] = spoiled[1, column].clone(), bad
        results = rows_and_gradient(path, logits, make_target(kind, logits.shape, teacher))
        spoiled[1, column] = kept
        for got, expected in zip(results, clean, strict=True):
            assert got[1].isnan().all()
            assert torch.equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("offset", [0.0, -80.0])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", [*FUSED, "linear"])
def test_logits_that_give_the_target_have_no_loss_and_no_gradient(path, kind, offset):
    """triton_kl_div (6) (7): softmax(log P + c) is P, so the loss is 0 within 1e-6, never below
    -1e-6. GPT-2's c is about -80, where float32 rounds a logit by 4e-6; the loss must not be."""
    vocab = 50257 if path != "linear" else 1001
    target = make_target(kind, (1, vocab))
    p = dense64(target).expand(1, vocab)
    logits = p.log().clamp_min(-200.0).add(offset).float()
    loss, gradient = rows_and_gradient(path, logits, target)
    assert loss.abs().max() <= 1e-6
    assert gradient.abs().max() <= 1e-5 * p.max()


ROWS = {
    "spread of 10 near -80": lambda: random_logits(8, 50257, scale=10.0) - 80,
    "spread of 3 near -80": lambda: random_logits(8, 50257) - 80,
    "level at -80.3": lambda: torch.full((2, 50257), -80.3, device=DEVICE),
    "two million tokens": lambda: random_logits(1, 1 << 21) - 80,
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_torch_path_is_exact_to_1e_6_whatever_sums_the_exponentials(rows, kind):
    """Relative, against float64, the gradient by its norm. ATen's softmax has 4 to 16 accumulators
    and is off by 1.8e-4 with AVX-512 and 4.2e-4 with AVX2 on two million tokens."""
    logits = ROWS[rows]()
    target = make_target(kind, logits.shape)
    loss, gradient = rows_and_gradient("torch", logits, target)
    exact_loss, exact_gradient = truth(logits, target)
    assert ((loss - exact_loss).abs() <= 1e-6 * exact_loss.abs()).all()
    assert (gradient - exact_gradient).norm() <= 1e-6 * exact_gradient.norm()


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("rows", ["spread of 10 near -80", "two million tokens"])
@pytest.mark.parametrize("path", FUSED)
def test_real_looking_logits_are_exact_to_2e_6(path, rows, kind):
    """torch_kl_div (3) (4), triton_teacher (1) (2) (3) (4) (5) (6) (7): float32, student and
    teacher apart and close; the gradient relative to softmax(z) by the norm, the loss above 1 nat.
    The longest rows show what sums the exponentials."""
    teacher = ROWS[rows]()[:4]
    target = make_target(kind, teacher.shape, teacher)
    for noise in (0.1, 10.0):
        logits = teacher + random_logits(*teacher.shape, seed=1, scale=noise)
        loss, gradient = rows_and_gradient(path, logits, target)
        exact_loss, exact_gradient = truth(logits, target)
        assert ((loss - exact_loss).abs() <= 2e-6 * exact_loss.clamp_min(1)).all()
        assert (gradient - exact_gradient).norm() <= 2e-6 * logits.double().softmax(-1).norm()


@pytest.mark.parametrize("dtypes", [(DTYPES[i - 1], DTYPES[i]) for i in range(3)], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_student_and_teacher_may_differ_in_dtype(path, dtypes):
    """Each on either side, tilted or not, on short and awkward shapes: against float64."""
    shapes = [(3, 2), (2, 3, 7), (127,), (0, 40)]
    for kind, shape in zip([*TEACHERS, "tilted teacher"], shapes, strict=True):
        logits = random_logits(*shape, dtype=dtypes[0])
        teacher = random_logits(*shape, dtype=dtypes[1], seed=1)
        assert_exact(path, logits, make_target(kind, shape, teacher), rtol=2e-6)


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
        loss, gradient = assert_exact(path, logits, TeacherTarget(teacher), rtol=2e-6)
        assert loss.isposinf().tolist() == [False, False, True]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_the_gradient_near_convergence_is_rounded_once(path, dtype):
    """P is within 1e-4 of softmax(z), a 20th of a bfloat16 rounding, yet their difference is right
    to the rounding of its own size: against float64. An upstream of 2^12 suits float16's range."""
    logits = random_logits(3, 1001, dtype=dtype)
    q = logits.double().softmax(-1)
    target = (q * (1 + 1e-4 * random_logits(3, 1001, seed=1, scale=1.0))).float()
    upstream = torch.full((3,), 4096.0, device=DEVICE)
    _, gradient = rows_and_gradient(path, logits, target, upstream)
    exact = truth(logits, target)[1]
    error = (gradient.double() / 4096 - exact).abs()
    # The interpreter truncates, so one ulp, or the least subnormal; and float32's roundings of the
    # exponents of softmax(z) and P, which are of the size of log q.
    info = torch.finfo(dtype)
    ulp = info.eps * exact.abs() + info.eps * info.smallest_normal / 4096
    assert (error <= ulp + 2 * 2**-22 * (1 - q.log()) * q).all()


@pytest.mark.parametrize("shape", [(1001,), (3, 1001)], ids=str)
@pytest.mark.parametrize("path", ["reference", *FUSED, "linear"])
def test_probabilities_are_scaled_to_sum_to_one(path, shape):
    """P and 3 P are one target: against float64. A negative one makes NaN of its row."""
    p = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 400
    assert_exact(path, random_logits(3, 1001), p)
    assert_exact(path, random_logits(3, 1001), 3 * p)
    p[..., 5] = -1e-3
    assert rows_and_gradient(path, random_logits(3, 1001), p)[0].isnan().all()


@pytest.mark.parametrize("kind", ["target tokens", "target tokens and beta", "row by row"])
@pytest.mark.parametrize("path", FUSED)
def test_rows_are_exact_up_to_1e9(path, kind):
    """The range that the docstring states, at both edges: rows whose largest logit is 1e9 or -1e9,
    in steps of float32's 64 there; and numbers that stand for -inf beside ordinary ones. Only the
    error of the largest number's last place is allowed."""
    steps = random_logits(2, 1001).mul(2).round() * 64
    logits = steps - steps.amax(-1, keepdim=True) + torch.tensor([[1e9], [-1e9]], device=DEVICE)
    target = make_target(kind, logits.shape)
    exact_loss, exact_gradient = truth(logits, target)
    loss, gradient = rows_and_gradient(path, logits, target)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)
    if kind != "target tokens and beta":  # which is zero nowhere
        logits = random_logits(2, 1001)
        masked = (dense64(target) == 0) & (logits > 1)
        assert_exact(path, logits.masked_fill(masked, torch.finfo(torch.float32).min), target)


def test_the_default_path_is_triton_on_cuda_but_for_float64():
    """Which Triton's kernels do not take; elsewhere PyTorch's."""
    assert {resolve_impl(None, torch.device("cuda"), dtype) for dtype in DTYPES} == {"triton"}
    assert resolve_impl(None, torch.device("cuda"), torch.float64) == "torch"
    assert {resolve_impl(None, torch.device("cpu"), dtype) for dtype in DTYPES} == {"torch"}
