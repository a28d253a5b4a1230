"""Shared by the tests of the losses: float64 truth, targets, paths, error bounds."""

import os
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.arguments import resolve
from kernels.reference import kl_div

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# "triton" without a GPU: the compiled kernels on tests/kernels/ptx, or Triton's interpreter.
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED_ON_CPU = DEVICE == "cpu" and not INTERPRETED and find_spec("triton") is not None
NEEDS_3_7 = pytest.mark.skipif(
    find_spec("triton") is not None and version("triton").startswith(("3.5.", "3.6.")),
    reason="Triton 3.5 shuffles inside the loop of the forward kernels: right, but slower",
)
FUSED = ["torch", "triton"]
PATHS = ["reference", *FUSED, "triton-simple", "linear"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = ["target tokens", "target tokens and beta", "tilted teacher", "row by row"]
TEACHERS = {"teacher": None, "tilted teacher": 2.0, "forbidding teacher": -float("inf")}  # G


def random_logits(*shape, dtype=torch.float32, seed=0, scale=3.0):
    """Draw the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def in_buffer(values, row_stride, offset=0):
    """Copy the rows to this row stride and storage offset; return them and the buffer they lie in,
    which is NaN before, between and after them."""
    rows, vocab = values.shape
    buffer = values.new_full((offset + rows * row_stride + 8,), float("nan"))
    view = buffer.as_strided((rows, vocab), (row_stride, 1), offset)
    return view.copy_(values), buffer


def two_level(vocab, alpha=1.0, beta=0.0):
    """Every third token is a target token, beginning with the first."""
    return TwoLevelTarget(torch.arange(vocab, device=DEVICE) % 3 == 0, alpha, beta)


def make_target(kind, shape, teacher=None):
    """Make a target for logits of this shape, a teacher's logits given or not; the dense ones hold
    exact zeros."""
    if kind == "target tokens":
        return two_level(shape[-1])
    if kind == "target tokens and beta":
        return two_level(shape[-1], 3.0, 0.5)
    if kind in TEACHERS:
        t, strength = random_logits(*shape, seed=1) if teacher is None else teacher, TEACHERS[kind]
        return TeacherTarget(t, None if strength is None else (two_level(shape[-1]), strength))
    p = random_logits(*shape, seed=1).softmax(-1)
    p[..., 1::4] = 0.0
    return p / p.sum(-1, keepdim=True)


def launch(kernels, logits, target, out=None):
    """Loss, lse, norm and gradient, written to `out` if given, by a module of launchers."""
    like = logits.shape, logits.device, logits.dtype
    parts = resolve(target, "none", None, None, *like)[0].parts
    out = torch.full_like(logits, float("nan")) if out is None else out
    loss, lse, norm = kernels.forward(logits, parts)
    kernels.backward(logits, lse, norm, parts, torch.ones_like(loss), out)
    return loss, lse, norm, out


def dense64(target):
    """P in float64, scaled to sum to 1."""
    if isinstance(target, TwoLevelTarget):
        return target.dense(torch.float64)
    if isinstance(target, TeacherTarget):
        return target.whole_logits(torch.float64).softmax(-1)
    return target.double() / target.double().sum(-1, keepdim=True)


def truth(logits, target):
    """Loss and gradient per row in float64; a term of probability zero counts zero."""
    p, z = dense64(target).expand(logits.shape), logits.detach().double()
    log_q = torch.log_softmax(z, -1)
    loss = torch.where(p > 0, p * (p.log() - log_q), 0.0).sum(-1)
    return loss, log_q.exp() - p


def rows_and_gradient(path, logits, target, upstream=None):
    """Loss of each row, and the gradient of the logits for an upstream of ones (or this one).

    "linear" multiplies by the identity, so that the hidden states are the logits.
    """
    leaf = logits.detach().requires_grad_()
    if path == "linear":
        head = torch.eye(logits.shape[-1], dtype=logits.dtype, device=DEVICE)
        loss = fused_linear_kl_div(leaf, head, target, "none", chunk_rows=4)
    elif path == "reference":
        loss = kl_div(leaf, target, "none")
    else:
        loss = fused_kl_div(leaf, target, "none", impl=path)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad


def assert_exact(path, logits, target, rtol=1e-6, atol=2e-6):
    """Loss and gradient against float64, to float32's rounding and that of the result."""
    loss, gradient = rows_and_gradient(path, logits, target)
    exact_loss, exact_gradient = truth(logits, target)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=rtol, atol=atol)
    rounding = 0 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5 + rounding, atol=atol)
    return loss, gradient


def assert_as_exact(got, reference, exact, eps):
    """Assert |error| <= the reference's own error + eps, for the largest row and for the RMS."""
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    width = exact.shape[-1] if exact.ndim > 1 else 1

    def errors(x: Tensor):
        rows = (x.double() - exact).reshape(-1, width)
        return rows.norm(dim=-1).max().item(), rows.square().mean().sqrt().item()

    for mine, its, what in zip(errors(got), errors(reference), ("row", "RMS"), strict=True):
        assert mine <= its + eps, f"{what}: {mine:.3g} > {its:.3g} + {eps:.3g}"


def loss_eps(logits):
    """Four float32 roundings of the largest number that enters a row's loss."""
    return 4 * 2**-24 * (logits[logits.isfinite()].abs().max().item() + 12 if logits.numel() else 0)


def gradient_eps(logits, target, gradient, path="torch"):
    """The same times the largest row of softmax(z), whose exponent carries the rounding of lse.

    Triton's interpreter truncates where hardware rounds to nearest: one ulp of bfloat16 more.
    """
    if not gradient.numel():
        return 0.0
    q = gradient + dense64(target)
    eps = q.norm(dim=-1).max().item() * loss_eps(logits)
    if "triton" in path and INTERPRETED and logits.dtype == torch.bfloat16:
        eps += gradient.norm(dim=-1).max().item() * 2**-7
    return eps


def hidden_and_head(*leading, vocab=211, dtype=torch.float32):
    """Hidden states and a head, 16 wide, whose logits have a deviation of 1.2; with gradients."""
    hidden = random_logits(*leading, 16, dtype=dtype, scale=1.0)
    weight = random_logits(vocab, 16, dtype=dtype, seed=1, scale=0.3)
    return hidden.requires_grad_(), weight.requires_grad_()


def unfused_linear(hidden, weight, target, reduction="batchmean", **_):
    """The definition of fused_linear_kl_div, whose other options change nothing."""
    return kl_div(F.linear(hidden, weight), target, reduction)


LOSSES = {  # both, of hidden states and a head
    "fused_kl_div": lambda h, w, *arguments, **options: fused_kl_div(
        F.linear(h, w), *arguments, **options
    ),
    "fused_linear_kl_div": partial(fused_linear_kl_div, chunk_rows=4),
}


def loss_and_gradients(loss, hidden, weight, *arguments, upstream=None, **options):
    """Value of a loss with an LM head, and its gradients of hidden states and head."""
    value = loss(hidden, weight, *arguments, **options)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight), upstream)


def exact_loss_and_gradients(hidden, weight, *arguments, upstream=None):
    """Those of the definition in float64."""
    wide = (x.detach().double().requires_grad_() for x in (hidden, weight))
    upstream = None if upstream is None else upstream.double()
    return loss_and_gradients(unfused_linear, *wide, *arguments, upstream=upstream)
