"""What only the Triton kernels have: alignment, the bitmask, 64-bit rows, one variant."""

import itertools
import math

import pytest
import torch

from kernels import TeacherTarget, TwoLevelTarget, bitmask
from tests.kernels.kl_cases import (
    DEVICE,
    INTERPRETED,
    TARGETS,
    dense64,
    in_buffer,
    launch,
    make_target,
    random_logits,
    truth,
)

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from kernels import triton_kl_div, triton_launch, triton_simple  # noqa: E402


@pytest.mark.parametrize("kind", ["target tokens and beta", "shared row", "row by row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_prologue_and_epilogue_is_exact_and_nothing_else_is_touched(dtype, kind):
    """Rows that start 0..7 elements past a boundary and have 0..2 vectors: against float64."""
    for vocab in (3, 8, 17, 24):
        values, target = random_logits(2, vocab, dtype=dtype), make_target(kind, (2, vocab))
        expected_loss, expected_gradient = truth(values, target)
        for offset in range(8):
            logits, _ = in_buffer(values, vocab + 1, offset)
            out, storage = in_buffer(torch.full_like(values, torch.nan), vocab + 1, offset)
            loss, *_ = launch(triton_launch, logits, target, out)
            assert torch.allclose(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
            epsilon = torch.finfo(dtype).eps
            assert torch.allclose(out.double(), expected_gradient, rtol=epsilon, atol=1e-6)
            out.fill_(torch.nan)
            assert storage.isnan().all()


def test_a_gradient_of_another_alignment_than_the_logits_is_the_same():
    """Another storage offset and stride: bitwise the gradient of the logits' alignment."""
    logits, target = random_logits(3, 1001), make_target("target tokens", (3, 1001))
    *_, expected = launch(triton_launch, logits, target)
    for stride, offset in ((1001, 1), (1002, 0), (1024, 3)):
        out, storage = in_buffer(torch.full_like(logits, torch.nan), stride, offset)
        launch(triton_launch, logits, target, out)
        assert torch.equal(out, expected)
        out.fill_(torch.nan)
        assert storage.isnan().all()


@pytest.mark.parametrize("vec", [4, 8])
@pytest.mark.parametrize("vocab", [2, 7, 4096, 5000, 8195])
def test_the_bitmask_holds_the_bit_of_every_column_in_a_vector(vocab, vec):
    """Every column's bit looked up by the formula of the docstring, none set beside them, and the
    number of bits set."""
    mask = torch.rand(vocab, generator=torch.Generator().manual_seed(0)) < 0.5
    table = bitmask.pack_bits(mask, vec)
    rounds = bitmask.PER_THREAD // vec
    for prologue in range(vec):
        column = torch.arange(max(0, vocab - prologue) // vec * vec)
        vector, element = column // vec, column % vec
        tile, thread = vector // bitmask.THREADS // rounds, vector % bitmask.THREADS
        bit = vector // bitmask.THREADS % rounds * vec + element
        words = table[prologue]
        got = words[tile, thread] >> bit & 1
        assert torch.equal(got.bool(), mask[prologue + column])
        set_bits = sum((words >> i & 1) for i in range(bitmask.PER_THREAD))
        assert set_bits.sum() == got.sum()
        counts = (words & ~0xFFFF).view(torch.float32)
        assert torch.equal(counts, set_bits.float())


@pytest.mark.skipif(DEVICE != "cpu", reason="8 GiB of address space, of which a GPU has none free")
def test_rows_more_than_2_31_elements_apart_are_found():
    """The pages between the two rows are never touched, so they take no memory."""
    stride, vocab = 2**31 + 8, 100
    logits = torch.empty(stride + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (stride, 1))
    logits.copy_(random_logits(2, vocab, dtype=torch.bfloat16))
    target = make_target("target tokens", (2, vocab))
    loss, *_ = triton_launch.forward(logits, target.parts)
    assert torch.allclose(loss.double(), truth(logits, target)[0], rtol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter accepts any address")
def test_every_promised_alignment_is_kept():
    """Compiled code faults where tl.multiple_of promises too much, on a GPU and without one.
    Logits, gradients and a teacher of the same alignment and of another, of either dtype."""
    for dtype, vocab in itertools.product((torch.float32, torch.bfloat16), (40, 41)):
        values = random_logits(3, vocab, dtype=dtype)
        for offset, out_offset, t_offset in itertools.product((0, 1), (0, 1), (0, 1)):
            logits, _ = in_buffer(values, vocab, offset)
            out, _ = in_buffer(values, vocab, out_offset)
            launch(triton_launch, logits, make_target("target tokens", (3, vocab)), out)
            for teacher in (values, values.float(), values.bfloat16()):
                t, _ = in_buffer(teacher, vocab, t_offset)
                launch(triton_launch, logits, TeacherTarget(t), out)
                launch(triton_launch, logits, TeacherTarget(t[:1].expand(3, -1)), out)


def test_the_lse_is_rounded_once():
    """Level rows near -80, picked by hand: the float32 nearest to z + log V, in float64. A sum
    M + log2 t in float32 is rounded at 115 and puts each of these one float32 beside it."""
    steps = torch.tensor([5.0, 39.0, 9549.0], device=DEVICE)
    logits = (-80 - steps * 2**-17)[:, None].expand(3, 7)
    logits, target = logits.contiguous(), make_target("target tokens", (3, 7))
    _, lse, *_ = launch(triton_launch, logits, target)
    assert torch.equal(lse, logits[:, 0].double().add(math.log(7)).float())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds c z before it subtracts")
@pytest.mark.parametrize("kind", TARGETS[:2])
def test_the_gradient_has_no_error_of_the_size_of_lse(kind):
    """triton_kl_div (8): near -80, float32 against float64. Only the roundings of c z - R and of
    the result are left; an lse rounded to float32 would be a relative error of up to 4e-6."""
    logits = random_logits(8, 1001) - 80
    target = make_target(kind, (8, 1001))
    *_, out = launch(triton_launch, logits, target)
    _, exact = truth(logits, target)
    q = exact + dense64(target)
    error = (out.double() - exact).abs()
    assert (error <= 2**-22 * (1 - q.log()) * q + 2**-23 * dense64(target)).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds c z before it subtracts")
def test_the_gradient_of_a_teacher_has_no_error_of_the_size_of_lse():
    """triton_teacher (7): as above, with an lse on either side."""
    logits, teacher = random_logits(8, 1001) - 80, random_logits(8, 1001, seed=1) - 70
    target = TeacherTarget(teacher)
    *_, out = launch(triton_launch, logits, target)
    log_q, log_p = logits.double().log_softmax(-1), teacher.double().log_softmax(-1)
    error = (out.double() - (log_q.exp() - log_p.exp())).abs()
    bound = sum((1 - log_x) * log_x.exp() for log_x in (log_q, log_p))
    assert (error <= 2**-22 * bound).all()


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_any_alignment_is_read_within_its_rows(dtype, tilted):
    """Against float64: rows that start 0..7 elements past a boundary, strides of their own, 0..2
    vectors and a tile with a rest. The teacher's storage ends with its last row."""
    for vocab, offset in itertools.product((3, 17, 24, 4111), (0, 3)):
        tokens = TwoLevelTarget(torch.arange(vocab, device=DEVICE) % 3 == 0)
        for shift in range(8 if vocab < 100 else 2):
            logits, _ = in_buffer(random_logits(2, vocab, dtype=dtype), vocab + 1, offset)
            storage = random_logits(shift + 2 * vocab, dtype=dtype, seed=1)
            teacher = storage[shift:].view(2, vocab)
            target = TeacherTarget(teacher, (tokens, 4.0) if tilted else None)
            out, _ = in_buffer(torch.full_like(logits, torch.nan), vocab + 1, offset)
            loss, _, norm, _ = launch(triton_launch, logits, target, out)
            u = target.whole_logits(torch.float64)
            expected_loss, expected_gradient = truth(logits, u.softmax(-1))
            assert torch.allclose(norm[:, 0].double(), u.logsumexp(-1), rtol=1e-6, atol=1e-6)
            assert torch.allclose(loss.double(), expected_loss, rtol=1e-6, atol=2e-6)
            epsilon = torch.finfo(dtype).eps
            rtol = 1e-6 + 2 * epsilon
            assert torch.allclose(out.double(), expected_gradient, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("kind", ["target tokens", "target tokens and beta"])
def test_the_simple_kernels_follow_the_maximum_from_block_to_block(kind):
    """triton_simple (1) (2) (3) (4): five blocks near -80, each with a larger maximum than the
    last; against float64. Its lse is rounded to float32, so the gradient is right to 4e-6."""
    logits = random_logits(2, 5000) - 80 + torch.arange(5000, device=DEVICE) / 100
    target = make_target(kind, (2, 5000))
    loss, *_, out = launch(triton_simple, logits, target)
    expected_loss, expected_gradient = truth(logits, target)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), expected_gradient, rtol=1e-5, atol=1e-7)


class Recorder:
    """Stands where a kernel stands: keeps what Triton would key its compiled variants on."""

    def __init__(self, kernel):
        if not isinstance(kernel, JITFunction):
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys = set()

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.keys.add(str(self.bind(*args, **kwargs)[1:]))


def test_one_variant_serves_all_rows_strides_and_vocabularies(monkeypatch):
    """Five N, among them 1 and 16, on which Triton specialises by default; four layouts."""
    recorders = []
    for name in ("forward_kernel", "backward_kernel"):
        recorders.append(Recorder(getattr(triton_kl_div, name)))
        monkeypatch.setattr(triton_kl_div, name, recorders[-1])
    for rows in (1, 2, 16, 17, 1000):
        for vocab, stride, offset in ((16, 16, 0), (17, 17, 0), (17, 64, 0), (17, 18, 1)):
            logits, _ = in_buffer(torch.zeros(rows, vocab, device=DEVICE), stride, offset)
            launch(triton_launch, logits, make_target("target tokens", (rows, vocab)))
    assert [len(recorder.keys) for recorder in recorders] == [1, 1]
