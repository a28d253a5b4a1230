"""Memory between rows: what a product is handed there is written, whatever the processor reads."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import TeacherTarget, fused_kl_div, torch_kl_div
from tests.kernels.kl_cases import DEVICE, hidden_and_head, in_buffer, random_logits, two_level

module = import_module("kernels.fused_linear_kl_div")  # the package's name is the function
PRODUCTS = ("mm", "addmm", "addmm_")


class Products(TorchDispatchMode):
    """Fails on a product of a matrix whose rows have anything but finite numbers between them."""

    def __init__(self):
        super().__init__()
        self.gaps = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in PRODUCTS:
            for x in args:
                if isinstance(x, torch.Tensor) and x.ndim == 2:
                    self.check(x if x.stride(1) == 1 else x.t())
        return function(*args, **(kwargs or {}))

    def check(self, x):
        rows, columns = x.shape
        if rows > 1 and x.stride(0) > columns:
            gap = x.stride(0) - columns
            between = x.as_strided((rows - 1, gap), x.stride(), x.storage_offset() + columns)
            assert between.isfinite().all()
            self.gaps += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["two_level", "teacher"])
def test_no_product_of_the_fused_head_is_handed_unwritten_memory(kind, dtype):
    """V = 211 in rows of 256, 40 rows in chunks of 16: oneDNN's products on AMX read the columns
    between, and 0 * NaN is NaN. The operator's body, for which the mode is not blind."""
    hidden, weight = (x.detach() for x in hidden_and_head(40, dtype=dtype))
    target = two_level(211)
    if kind == "teacher":
        target = TeacherTarget.from_hidden(hidden.clone(), weight.clone())
    g = torch.ones(1, device=DEVICE).expand(40)
    body = partial(module.loss_and_gradients, kind, hidden, weight, g)
    with Products() as products:
        _, *gradients = body(True, True, 16, dtype, *target.parts, "torch")
    assert products.gaps == 2 * 3  # dh and dW of three chunks
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("vocab", [1001, 50257])
def test_the_gradient_of_padded_logits_has_zeros_between_its_rows(vocab):
    """It keeps the logits' stride, and the head's products read it: small, and in huge pages."""
    logits, _ = in_buffer(random_logits(12, vocab), (vocab + 63) // 64 * 64)
    loss = fused_kl_div(logits.requires_grad_(), two_level(vocab))
    (gradient,) = torch.autograd.grad(loss, logits)
    Products().check(gradient)
    out = torch_kl_div.empty_gradient(logits.detach())
    stride = out.stride(0)
    between = out.as_strided((11, stride - vocab), (stride, 1), out.storage_offset() + vocab)
    assert (between == 0).all()
