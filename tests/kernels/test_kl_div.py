"""The fused losses against float64: every dtype, awkward shapes, awkward memory."""

import pytest
import torch

from kernels.arguments import resolve_impl
from kernels.fused_kl_div import launchers
from tests.kernels.kl_cases import (
    DTYPES,
    FUSED,
    PATHS,
    TARGETS,
    assert_as_exact,
    gradient_eps,
    in_buffer,
    launch,
    loss_eps,
    make_target,
    random_logits,
    rows_and_gradient,
    truth,
    two_level,
)

# Vocabularies: 2 is the smallest that makes sense; 7 and 127 are shorter than any tile; 1000 is a
# multiple of 8 but not of 16; 50,257 is GPT-2's; 50,256, 50,264 and 50,304 are multiples of 8 or 64
# near it, to which others pad; 65,537 is one past 2^16. Zero to two leading dimensions; rows: none,
# one, a prime.
SHAPES = [(3, 2), (1, 2), (5, 7), (1, 3, 7), (0, 127), (2, 0, 127), (7, 127), (127,), (2, 1, 1000)]
LONG_SHAPES = [(2, 50256), (3, 50257), (1, 2, 50264), (2, 50304), (1, 65537)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", PATHS[1:])
def test_loss_and_gradient_are_as_exact_as_the_reference(path, kind, dtype):
    """torch_kl_div (1) (2), triton_kl_div (1) (2): against float64, on every short shape; the
    reference in the same dtype sets the bound."""
    for shape in SHAPES:
        check(path, random_logits(*shape, dtype=dtype), make_target(kind, shape))


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", FUSED)
def test_a_vocabulary_of_any_size_is_exact(path, kind, shape):
    """triton_kl_div (6): as above, a few rows at full length; one dtype per shape, float32 for
    GPT-2's."""
    dtype = DTYPES[(LONG_SHAPES.index(shape) + 2) % 3]
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
def test_nothing_is_written_outside_the_gradient(path, kind):
    """It lies in a larger buffer of a known value."""
    logits = random_logits(3, 1001)
    whole = logits.new_full((5, 1024), 12345.0)
    target, out = make_target(kind, logits.shape), whole[1:4, 5:1006].fill_(float("nan"))
    _, lse, *_ = launch(launchers(path, logits.device), logits, target, out)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out.double(), truth(logits, target)[1], rtol=1e-4, atol=1e-8)
    out.fill_(12345.0)
    assert (whole == 12345.0).all()


@pytest.mark.parametrize("path", FUSED)
def test_two_runs_agree_bitwise(path):
    """Loss and gradient, at GPT-2's vocabulary."""
    logits, target = random_logits(2, 50257), two_level(50257, 2.0, 1.0)
    first, second = (rows_and_gradient(path, logits, target) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_default_path_is_triton_on_cuda_but_for_float64():
    """Which Triton's kernels do not take; elsewhere PyTorch's."""
    assert {resolve_impl(None, torch.device("cuda"), dtype) for dtype in DTYPES} == {"triton"}
    assert resolve_impl(None, torch.device("cuda"), torch.float64) == "torch"
    assert {resolve_impl(None, torch.device("cpu"), dtype) for dtype in DTYPES} == {"torch"}
