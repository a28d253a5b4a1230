"""The fused losses against float64: every dtype, awkward shapes, awkward memory."""

from types import SimpleNamespace

import pytest
import torch

from kernels import fused_kl_div, torch_kl_div
from kernels.arguments import resolve
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    FUSED,
    PATHS,
    TARGETS,
    assert_as_exact,
    gradient_eps,
    in_buffer,
    loss_eps,
    make_target,
    parts_of,
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
@pytest.mark.parametrize("path", PATHS)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_half_precision_at_the_size_of_gpt2_is_exact(path, dtype):
    """As above, with logits offset to where GPT-2's lie, around -80."""
    logits = (random_logits(2, 50257) - 80).to(dtype)
    check(path, logits, two_level(50257))


@pytest.mark.parametrize("path", FUSED)
def test_more_rows_than_one_wave_of_programs_are_exact(path):
    """Against float64, as above: an H100 has 132 multiprocessors for at most 8 programs of 256
    threads each, one row less than here. Without a GPU there are no waves, and fewer rows do."""
    rows = 1057 if DEVICE == "cuda" or path == "torch" else 37
    check(path, random_logits(rows, 7), two_level(7))


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


@pytest.mark.parametrize("layout", [(50257, 0), (50258, 0), (50304, 0), (50257, 1), (50304, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", FUSED)
def test_the_layout_of_the_rows_changes_nothing_beyond_rounding(path, dtype, layout):
    """Row strides and storage offsets, aligned and not; NaN in the padding must not leak."""
    vocab = 50257 if path == "torch" or layout[0] == 50304 else 1001
    logits = random_logits(2, vocab, dtype=dtype)
    target = two_level(vocab, 2.0, 1.0)
    strided, _ = in_buffer(logits, vocab + layout[0] - 50257, layout[1])
    for got, expected in zip(
        rows_and_gradient(path, strided, target),
        rows_and_gradient(path, logits, target),
        strict=True,
    ):
        torch.testing.assert_close(
            got, expected, rtol=2e-6 if dtype.itemsize == 4 else 8e-3, atol=1e-9
        )


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_share_no_stride_are_read_right(path):
    """Transposed, every other column, sliced in the middle, one row expanded: against a copy."""
    base = random_logits(2, 4, 6)
    views = [base.transpose(0, 2), base[..., ::2], base[:, :-1], base[:1, :1].expand(3, 2, 6)]
    for view in views:
        target = two_level(view.shape[-1], 2.0, 1.0)
        for got, expected in zip(
            rows_and_gradient(path, view, target),
            rows_and_gradient(path, view.contiguous(), target),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("path", FUSED)
def test_nothing_is_written_outside_the_outputs(path, kind, monkeypatch):
    """Each output lies in a larger buffer of a known value, poisoned with NaN before the call."""
    from kernels.fused_kl_div import launchers

    canary, guard, buffers = 12345.0, 64, []
    new_empty = torch.Tensor.new_empty

    def guarded(self, *size, **options):
        size = torch.Size(size[0] if isinstance(size[0], tuple | torch.Size) else size)
        if not options.get("dtype", self.dtype).is_floating_point:
            return new_empty(self, size, **options)
        buffer = new_empty(self, size.numel() + 2 * guard, **options).fill_(canary)
        buffers.append(buffer)
        return buffer[guard:-guard].fill_(float("nan")).view(size)

    logits = random_logits(3, 1001)
    target = make_target(kind, logits.shape)
    parts = parts_of(target, logits)
    kernels = launchers(path, logits.device)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", guarded)
        loss, lse, norm = kernels.forward(logits, parts)
    whole = logits.new_full((5, 1024), canary)
    out = whole[1:4, 5:1006].fill_(float("nan"))
    kernels.backward(logits, lse, norm, parts, torch.ones_like(loss), out)
    for buffer in buffers:
        assert (buffer[:guard] == canary).all()
        assert (buffer[-guard:] == canary).all()
    exact_loss, exact_gradient = truth(logits, target)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out.double(), exact_gradient, rtol=1e-4, atol=1e-8)
    out.fill_(canary)
    assert (whole == canary).all()


@pytest.mark.parametrize("path", FUSED)
def test_two_runs_agree_bitwise(path):
    """Loss and gradient, at GPT-2's vocabulary."""
    logits, target = random_logits(2, 50257), two_level(50257, 2.0, 1.0)
    first, second = (rows_and_gradient(path, logits, target) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("path", FUSED)
def test_a_padded_gradient_keeps_the_alignment_of_the_logits(path):
    """A row stride of 50,304 stays 50,304, so the LM head's products read aligned rows as well."""
    logits, _ = in_buffer(random_logits(2, 50257), 50304)
    loss = fused_kl_div(logits.requires_grad_(), two_level(50257), impl=path)
    assert torch.autograd.grad(loss, logits)[0].stride() == (50304, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="huge pages are the CPU path's")
def test_large_gradients_are_whole_in_memory_of_their_own():
    """Two gradients of 2.4 MB do not share memory, and outlive the call that made them."""
    logits = random_logits(12, 50257)
    first, second = (torch_kl_div.empty_gradient(logits).fill_(value) for value in (1.0, 2.0))
    assert (first == 1).all()
    assert (second == 2).all()


def test_the_default_path_is_triton_on_cuda_but_for_float64():
    """Which Triton's kernels do not take; elsewhere PyTorch's."""

    def default(device, dtype):
        target = two_level(9)
        target.mask = SimpleNamespace(device=torch.device(device))
        return resolve(target, "sum", None, None, torch.Size((2, 9)), torch.device(device), dtype)[
            1
        ]

    cuda = [torch.float32, torch.bfloat16, torch.float16]
    assert {default("cuda", dtype) for dtype in cuda} == {"triton"}
    assert default("cuda", torch.float64) == "torch"
    assert {default("cpu", dtype) for dtype in cuda} == {"torch"}
