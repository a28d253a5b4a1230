"""What only the Triton kernels have: alignment, 64-bit rows, one variant."""

import itertools
import math

import pytest
import torch

from kernels import TeacherTarget
from tests.kernels.kl_cases import (
    DEVICE,
    INTERPRETED,
    dense64,
    in_buffer,
    launch,
    make_target,
    random_logits,
    truth,
    two_level,
)

triton = pytest.importorskip("triton")

from kernels import triton_kl_div, triton_launch  # noqa: E402


@pytest.mark.parametrize("kind", ["two levels", "teacher", "teacher, tilted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_alignment_are_exact_and_nothing_else_is_touched(dtype, kind):
    """Against float64: rows that start 0..7 elements past a boundary and have 0..2 vectors, or a
    tile and a rest. Gradient and teacher start and step as the logits do, or elsewhere; a teacher
    has their dtype or another, and its storage ends with its last row. Compiled code faults where
    tl.multiple_of promises too much, on a GPU and without one."""
    cases = [*itertools.product((3, 8, 17, 24), range(8), (0, 5))]
    cases += itertools.product((4111,), (0, 3), (0, 1))
    epsilon = torch.finfo(dtype).eps
    for vocab, offset, shift in cases:
        logits, _ = in_buffer(random_logits(2, vocab, dtype=dtype), vocab + 1, offset)
        target = p = two_level(vocab, 3.0, 0.5)
        atol, rtol = 1e-6, epsilon
        if kind.startswith("teacher"):
            stride, t_dtype = vocab + (shift > 0), (torch.float32, torch.bfloat16)[offset % 2]
            storage = random_logits(shift + stride + vocab, dtype=t_dtype, seed=1)
            t = storage.as_strided((2, vocab), (stride, 1), shift)
            target = TeacherTarget(t, (two_level(vocab), 4.0) if "tilted" in kind else None)
            u = target.whole_logits(torch.float64)
            p, atol, rtol = u.softmax(-1), 2e-6, 1e-6 + 2 * epsilon
        nan = torch.full_like(logits, torch.nan)
        out, storage = in_buffer(nan, vocab + 1 + shift, offset + shift)
        loss, _, norm, _ = launch(triton_launch, logits, target, out)
        expected_loss, expected_gradient = truth(logits, p)
        assert torch.allclose(loss.double(), expected_loss, rtol=1e-6, atol=atol)
        assert torch.allclose(out.double(), expected_gradient, rtol=rtol, atol=1e-6)
        if kind.startswith("teacher"):
            assert torch.allclose(norm[:, 0].double(), u.logsumexp(-1), rtol=1e-6, atol=1e-6)
        out.fill_(torch.nan)
        assert storage.isnan().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="8 GiB of address space, of which a GPU has none free")
def test_rows_more_than_2_31_elements_apart_are_found():
    """The pages between the two rows are never touched, so they take no memory."""
    stride, vocab = 2**31 + 8, 100
    logits = torch.empty(stride + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (stride, 1))
    logits.copy_(random_logits(2, vocab, dtype=torch.bfloat16))
    target = make_target("target tokens", (2, vocab))
    loss, *_ = triton_launch.forward(logits, target.parts)
    assert torch.allclose(loss.double(), truth(logits, target)[0], rtol=1e-6)


def test_the_lse_is_rounded_once():
    """Level rows near -80, picked by hand: the float32 nearest to z + log V, in float64. A sum
    M + log2 t in float32 is rounded at 115 and puts each of these one float32 beside it."""
    steps = torch.tensor([5.0, 39.0, 9549.0], device=DEVICE)
    logits = (-80 - steps * 2**-17)[:, None].expand(3, 7)
    logits, target = logits.contiguous(), make_target("target tokens", (3, 7))
    _, lse, *_ = launch(triton_launch, logits, target)
    assert torch.equal(lse, logits[:, 0].double().add(math.log(7)).float())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds c z before it subtracts")
@pytest.mark.parametrize("kind", ["target tokens", "target tokens and beta", "teacher"])
def test_the_gradient_has_no_error_of_the_size_of_lse(kind):
    """triton_kl_div (8), triton_teacher (7): near -80, float32 against float64. Only the roundings
    of c z - R, which a teacher has twice, and of the result are left; an lse rounded to float32
    would be a relative error of up to 4e-6."""
    logits, teacher = random_logits(8, 1001) - 80, random_logits(8, 1001, seed=1) - 70
    p = teacher.double().softmax(-1)
    target = TeacherTarget(teacher) if kind == "teacher" else make_target(kind, (8, 1001))
    if kind != "teacher":
        p = dense64(target)
    *_, out = launch(triton_launch, logits, target)
    q = logits.double().softmax(-1)
    bound = 2**-22 * (1 - q.log()) * q
    bound += 2**-22 * (1 - p.log()) * p if kind == "teacher" else 2**-23 * p
    assert ((out.double() - (q - p)).abs() <= bound).all()


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
def test_one_variant_serves_all_rows_strides_and_vocabularies():
    """Five N, among them 1 and 16, on which Triton specialises by default; four layouts."""
    kernels = triton_kl_div.forward_kernel, triton_kl_div.backward_kernel
    for kernel in kernels:
        kernel.device_caches.clear()
    for rows in (1, 2, 16, 17, 100):
        for vocab, stride, offset in ((16, 16, 0), (17, 17, 0), (17, 64, 0), (17, 18, 1)):
            logits, _ = in_buffer(torch.zeros(rows, vocab, device=DEVICE), stride, offset)
            launch(triton_launch, logits, two_level(vocab))
    assert [len(variants) for k in kernels for variants, *_ in k.device_caches.values()] == [1, 1]
