"""fused_linear_kl_div against F.linear and the loss: exactness, dtypes, chunks, products."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import (
    COMPILED_ON_CPU,
    DEVICE,
    DTYPES,
    FUSED,
    TARGETS,
    TEACHERS,
    assert_as_exact,
    exact_loss_and_gradients,
    hidden_and_head,
    in_buffer,
    loss_and_gradients,
    make_target,
    random_logits,
    two_level,
    unfused_linear,
)

module = import_module("kernels.fused_linear_kl_div")  # the package's name is the function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_loss_and_gradients_are_as_exact_as_the_unfused_ones(path, reduction, dtype):
    """fused_linear_kl_div (1) (2) (3): against float64; F.linear and the reference in the same
    dtype set the bound. An upstream gradient per row, and chunks that do not divide the rows."""
    shapes = [(7,), (2, 3)] if path == "triton" else [(7,), (2, 3), (1, 2, 5), (67,)]
    for leading in shapes:
        hidden, weight = hidden_and_head(*leading, dtype=dtype)
        for kind in TARGETS if dtype == torch.float32 else TARGETS[:1]:
            target = make_target(kind, (*leading, 211))
            upstream = random_logits(*leading, seed=5) if reduction == "none" else None
            args, options = (hidden, weight, target, reduction), {"chunk_rows": 4, "impl": path}
            got = loss_and_gradients(fused_linear_kl_div, *args, upstream=upstream, **options)
            same = loss_and_gradients(unfused_linear, *args, upstream=upstream)
            exact = exact_loss_and_gradients(*args, upstream=upstream)
            # Triton's interpreter truncates dz, and each chunk of four rows is rounded.
            slack = 2**-20 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
            for mine, its, true in zip(got, same, exact, strict=True):
                eps = slack * max(1e-3, true.norm(dim=-1).max().item())
                assert_as_exact(mine, its, true, eps)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("path", FUSED)
def test_the_fused_head_computes_the_teachers_logits_by_chunks(path, reduction, kind):
    """Loss and both gradients, and the reference's, against float64; a teacher of another width."""
    hidden, weight = hidden_and_head(2, 5)
    head = random_logits(2, 5, 9, seed=3), random_logits(211, 9, seed=4)
    exact_target = make_target(kind, (2, 5, 211), F.linear(*(x.double() for x in head)))
    target = TeacherTarget.from_hidden(*head, exact_target.tilt)
    upstream = random_logits(2, 5, seed=5) if reduction == "none" else None
    exact = exact_loss_and_gradients(hidden, weight, exact_target, reduction, upstream=upstream)
    for loss in (fused_linear_kl_div, unfused_linear):
        arguments, options = (hidden, weight, target, reduction), {"chunk_rows": 4, "impl": path}
        got = loss_and_gradients(loss, *arguments, upstream=upstream, **options)
        for mine, true in zip(got, exact, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=1e-6)


def test_a_teachers_head_multiplies_in_the_dtype_of_autocast():
    """As F.linear does, to the rounding of the loss."""
    (hidden, weight), head = hidden_and_head(3), hidden_and_head(3)
    with torch.autocast(DEVICE, torch.bfloat16):
        by_chunks = fused_linear_kl_div(hidden * 2, weight, TeacherTarget.from_hidden(*head))
        whole = fused_linear_kl_div(hidden * 2, weight, TeacherTarget(F.linear(*head)))
    torch.testing.assert_close(by_chunks, whole)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_autocast_keeps_float32_weights_and_their_gradient(reduction):
    """Products are in bfloat16, as F.linear's; the weight's gradient is float32 and adds to the
    embedding's, as GPT-2's tied head needs. The unfused loss's error to float64 is the bound."""
    ids = torch.arange(12, device=DEVICE) % 5
    _, weight = hidden_and_head(1)
    target = two_level(211)

    def step(loss, dtype=torch.float32, autocast=True):
        w = weight.detach().to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss(F.embedding(ids, w), w, target, reduction, chunk_rows=5)
        value.sum().backward()
        return value.detach(), w.grad

    got, same = step(fused_linear_kl_div), step(unfused_linear)
    exact = step(unfused_linear, torch.float64, autocast=False)
    assert got[1].dtype == torch.float32
    for mine, its, true in zip(got, same, exact, strict=True):
        assert_as_exact(mine, its, true, 2**-9 * true.norm(dim=-1).max().item())


def test_autocast_leaves_float64_as_it_is():
    """As F.linear's: bit for bit the loss and gradients without autocast; a float64 and a float32
    argument are refused, of which F.linear would make two dtypes."""
    hidden, weight = (x.detach().double().requires_grad_() for x in hidden_and_head(3))
    arguments = fused_linear_kl_div, hidden, weight, two_level(211)
    expected = loss_and_gradients(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = loss_and_gradients(*arguments)
        with pytest.raises(ValueError, match="leaves float64 alone"):
            fused_linear_kl_div(hidden, weight.float(), two_level(211))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].dtype == torch.float64


def test_a_head_of_more_than_a_weight_is_one_merged_weight():
    """LoRA and a bias, as the docstring merges them: loss and gradients of every part are those of
    the unfused head."""
    hidden, base = (x.detach() for x in hidden_and_head(5))
    parts = [random_logits(*shape, seed=2, scale=0.3) for shape in ((211, 2), (2, 16), (211,))]
    leaves = [x.requires_grad_() for x in (hidden, *parts)]
    h, b, a, bias = leaves
    weight = base + 0.5 * b @ a
    expected = kl_div(F.linear(h, weight, bias), two_level(211))
    wide = torch.cat([h, torch.ones(5, 1, device=DEVICE)], 1), torch.cat([weight, bias[:, None]], 1)
    got = fused_linear_kl_div(*wide, two_level(211))
    torch.testing.assert_close(got, expected)
    for x in leaves:
        gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_accumulation_over_chunks_is_in_float32_whatever_the_dtype():
    """512 chunks of one row in bfloat16: a weight's gradient summed in bfloat16 would have several
    times the error of the unfused one, which is rounded once."""
    hidden, weight = hidden_and_head(512, vocab=31, dtype=torch.bfloat16)
    target = two_level(31)
    _, _, got = loss_and_gradients(fused_linear_kl_div, hidden, weight, target, chunk_rows=1)
    _, _, same = loss_and_gradients(unfused_linear, hidden, weight, target)
    _, _, exact = exact_loss_and_gradients(hidden, weight, target)
    assert (got.double() - exact).norm() <= 1.5 * (same.double() - exact).norm()


@pytest.mark.parametrize("path", FUSED)
def test_the_usual_upstream_gradient_moves_nothing(path, monkeypatch):
    """loss.backward() of a mean, with weights or without, hands 1 to the gradients that the forward
    has made: on the CPU no product is called, on CUDA the kernel stores nothing."""
    hidden, weight = hidden_and_head(9)
    weights = torch.arange(9.0, device=hidden.device)
    for options in ({}, {"row_weights": weights}):
        loss = fused_linear_kl_div(hidden, weight, two_level(211), impl=path, **options)
        counts = nullcontext([])
        if path == "triton" and COMPILED_ON_CPU:
            counts = import_module("tests.kernels.ptx.driver").counted()
        with monkeypatch.context() as patch, counts as launches:
            if path == "triton" or hidden.device.type == "cpu":
                patch.setattr(torch.Tensor, "mul_", None)
            loss.backward()
        assert all(counts.stores.bytes == 0 for _, counts in launches)
        assert len(launches) == (2 if path == "triton" and COMPILED_ON_CPU else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_product_of_the_fused_head_is_handed_unwritten_memory(dtype, monkeypatch):
    """V = 211 in rows of 256, 40 rows in chunks of 16: oneDNN's products on AMX read the columns
    between, and 0 * NaN is NaN."""
    between, add_product = [], module._add_product

    def recorded(total, dz, *others, **options):
        assert dz.untyped_storage().nbytes() == 16 * 256 * dz.itemsize  # of one chunk
        shape, start = (len(dz) - 1, 256 - 211), dz.storage_offset() + 211
        between.append(dz.as_strided(shape, (256, 1), start).clone())
        add_product(total, dz, *others, **options)

    monkeypatch.setattr(module, "_add_product", recorded)
    arguments = *hidden_and_head(40, dtype=dtype), two_level(211)
    results = loss_and_gradients(fused_linear_kl_div, *arguments, chunk_rows=16, impl="torch")
    assert len(between) == 3
    assert all(x.isfinite().all() for x in (*between, *results))


@pytest.mark.parametrize("vocab", [1001, 50257])
@pytest.mark.parametrize("path", FUSED)
def test_the_gradient_of_padded_logits_has_their_stride_and_zeros_between_its_rows(path, vocab):
    """The head's products read aligned rows as before, and the columns between: small, and in huge
    pages."""
    stride = (vocab + 63) // 64 * 64
    logits, _ = in_buffer(random_logits(12, vocab), stride)
    loss = fused_kl_div(logits.requires_grad_(), two_level(vocab), impl=path)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.stride() == (stride, 1)
    between = gradient.as_strided((11, stride - vocab), (stride, 1), vocab)
    assert (between == 0).all()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch 2.9 has them on CUDA only")
@pytest.mark.parametrize("has_wide_addmm", [True, False])
def test_products_that_can_return_float32_are_asked_to(has_wide_addmm, monkeypatch):
    """The calls made on CUDA, on the meta device, which has them as well: dh and dW in float32.
    On CUDA, PyTorch 2.9's addmm refuses a float32 to add to, which meta does not show."""
    monkeypatch.setattr(module, "has_wide_products", lambda _: True)
    monkeypatch.setattr(module, "HAS_WIDE_ADDMM", has_wide_addmm)
    if not has_wide_addmm:
        monkeypatch.setattr(torch, "addmm", None)
    dz, w, h = (torch.empty(s, device="meta").bfloat16() for s in ((4, 30), (30, 8), (4, 8)))
    assert module._product(dz, w).dtype == torch.float32
    total = torch.empty(30, 8, device="meta")
    for first in (True, False):
        module._add_product(total, dz, h, first)
    assert total.dtype == torch.float32
