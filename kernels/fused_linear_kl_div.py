"""The LM head and the loss in one: logits exist for one chunk of rows at a time.

For hidden states h (N, C), the head's weight W (V, C), a target P and a factor g per row,

    z = h W^T,    L = sum over rows of g KL(P || softmax(z))                           (1)
    dz = g (softmax(z) - P)                                                            (2)
    dh = dz W,    dW = dz^T h                                                          (3)

All chunks share one buffer for z; the loss's backward writes dz over it, and two matrix products
make dh and add to dW. A teacher that is given by its hidden states has a second buffer. (Liger's
fused linear cross-entropy had the idea; Cut Cross-Entropy, Wijmans et al. 2024, keeps no chunk.)

When the gradients are formed. For "batchmean" and "sum" the upstream gradient is one number, so the
forward computes (2) and (3) while it has the chunk's logits, with 1 / N, or the row's weight over
the sum of weights, in g. That number is 1 for loss.backward(); any other (gradient accumulation, a
gradient scaler, a sum of two losses) scales the results in place. Three cases compute the logits
again in the backward, one more product, or two with a teacher's head: "none", where each row has an
upstream gradient of its own; float16, whose range would lose dz before the gradient scaler's factor
reaches it; and a second backward over a retained graph.

Precision. Products run in the dtype of the arguments, or autocast's; the loss and dW's sum over
chunks in float32 (float64 for float64). On CUDA, the products of (3) return float32 sums that would
be rounded to 16 bits: cuBLAS splits the sum over V of dh and would add its parts in 16 bits. Rows
of the buffer are 64 n elements long, 50,304 for 50,257, so that each starts on an aligned address;
the columns between are zero, because oneDNN's products on AMX read them.

Traffic of loss and gradients in float32, N C left out, for n = N / chunk_rows chunks, rounded up:

    N V elements   z written, read by the loss, read and overwritten by dz, read twice       6
    V C elements   W read twice a chunk                                                    2 n
                   dW written by the first chunk, read and written by the others       2 n - 1
                   dW read and written if the upstream gradient is not 1                     2

F.linear and the unfused loss take 16 and 3. Each chunk more saves memory and costs V C.
"""

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .fused_kl_div import NAMESPACE, SCHEMAS, first_derivative, launchers, reduced, unpack
from .reference import compute_dtype
from .target import Target, Teacher, check_floating
from .torch_kl_div import zero_padded

CHUNK_ROWS = 512  # 103 MB of float32 logits at V = 50,257
CUDA_CHUNK_ROWS = 2048  # 412 MB: what a GPU needs to be busy with each product
VOCAB_BLOCK = 8192  # rows of dW at a time, where a product cannot be added to it
# PyTorch 2.9's addmm with an out_dtype takes no float32 to add to: pytorch/pytorch#167931.
HAS_WIDE_ADDMM = torch.__version__ >= "2.11"  # compared as versions, not as text


def fused_linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    reduction: str = "batchmean",
    chunk_rows: int | None = None,
    impl: str | None = None,
    *,
    row_weights: Tensor | None = None,
) -> Tensor:
    """fused_kl_div(F.linear(hidden, weight), target, reduction), a chunk of logits at a time.

    Args:
        hidden: (..., C), the LM head's input.
        weight: (V, C), as F.linear takes it; of hidden's dtype, or any under autocast (which leaves
            float64 as it is). It must be all that makes the logits: with LoRA, pass the merged
            head.weight + scale * B @ A; with a bias, append the bias to it as a column, and a
            column of ones to hidden.
        target, reduction, impl, row_weights: as in fused_kl_div, for logits (..., V).
        chunk_rows: rows whose logits exist at a time; None: 2,048 on CUDA, 512 elsewhere.

    Returns and raises as fused_kl_div.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    leading, rows = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    dtype = arguments.product_dtype(rows, weight)
    like = torch.Size((*leading, weight.shape[0])), hidden.device, dtype
    target, impl, weights = arguments.resolve(target, reduction, impl, row_weights, *like)
    if chunk_rows is None:
        chunk_rows = CUDA_CHUNK_ROWS if hidden.is_cuda else CHUNK_ROWS
    if not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be a whole number of at least 1, got {chunk_rows}")
    parts: Any = target.parts
    if isinstance(parts, Teacher) and parts.weight is not None:
        teacher_dtype = arguments.product_dtype(parts.logits, parts.weight, "the teacher's ")
        parts = parts._replace(logits=parts.logits.to(teacher_dtype))
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    early = grad and reduction != "none" and dtype != torch.float16
    needs = early and hidden.requires_grad, early and weight.requires_grad
    compiles = torch.compiler.is_compiling()  # see fused_kl_div
    run = _LinearKlDiv.apply if grad or not compiles else _LinearKlDiv.forward
    options = *needs, chunk_rows, dtype, *parts, impl
    loss, *_ = run(rows, weight, weights, reduction, target.kind, *options)
    return loss.view(leading) if reduction == "none" else loss


def _operator(kind: str) -> Any:
    """Register the operator of a kind of target."""
    schema = (
        "(Tensor hidden, Tensor weight, Tensor g, bool need_hidden, bool need_weight, "
        f"SymInt chunk_rows, ScalarType dtype, {SCHEMAS[kind]}) "
        "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)"
    )

    @torch.library.custom_op(f"{NAMESPACE}::linear_kl_div_{kind}", mutates_args=(), schema=schema)
    def operator(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return loss_and_gradients(kind, *inputs)

    @operator.register_fake
    def _(hidden: Tensor, weight: Tensor, g: Tensor, *options: Any) -> tuple[Tensor, ...]:
        need_hidden, need_weight, *_ = options
        loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
        grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
        return loss, grad_hidden, weight.new_empty(weight.shape if need_weight else 0)

    return operator


def loss_and_gradients(
    kind: str, hidden: Tensor, weight: Tensor, g: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, (N,); dh and dW of (3) if needed, else (0,).

    hidden: (N, C). g: that of (2), (N,); a row where it is 0 reaches no gradient, whatever is in
    it. dtype: of the products.
    """
    need_hidden, need_weight, chunk_rows, dtype, *parts = options
    kernels, target = unpack(kind, parts, hidden.device)
    n, vocab = len(hidden), len(weight)
    loss = hidden.new_empty(n, dtype=compute_dtype(hidden.dtype))
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    # Unwritten until the first chunk; zero if there are no rows.
    grad_weight = (loss.new_empty if n else loss.new_zeros)(weight.shape if need_weight else 0)

    def head(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        buffer = hidden.new_empty(min(chunk_rows, n), (vocab + 63) // 64 * 64, dtype=dtype)
        return weight.to(dtype), zero_padded(buffer, vocab)

    with torch.autocast(hidden.device.type, enabled=False):
        w, buffer = head(weight, dtype)
        teacher_weight = target.weight if kind == "teacher" else None
        if teacher_weight is not None:
            teacher_weight, teacher_buffer = head(teacher_weight, target.logits.dtype)
        for start in range(0, n, chunk_rows):
            rows = slice(start, min(start + chunk_rows, n))
            h, of_rows = hidden[rows].to(dtype), target  # (R, C)
            z = torch.mm(h, w.t(), out=buffer[: len(h)])  # (1): (R, V)
            if kind == "teacher":
                t = target.logits[rows]
                if teacher_weight is not None:  # (R, C) -> (R, V)
                    t = torch.mm(t, teacher_weight.t(), out=teacher_buffer[: len(h)])
                of_rows = target._replace(logits=t)
            loss[rows], lse, norm = kernels.forward(z, of_rows)
            if need_hidden or need_weight:  # (2), over z
                kernels.backward(z, lse, norm, of_rows, g[rows], z)
            if need_hidden:
                grad_hidden[rows] = _product(z, w).to(hidden.dtype)  # (3): (R, C)
            if need_weight:
                if g.stride(0) != 0:  # 0 * NaN would be NaN
                    h = h.masked_fill(g[rows, None] == 0, 0.0)
                _add_product(grad_weight, z, h, first=start == 0)  # (3): (V, C)
    return loss, grad_hidden, grad_weight.to(weight.dtype)


OPERATORS = {kind: _operator(kind) for kind in SCHEMAS}


@torch.library.custom_op(f"{NAMESPACE}::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, impl: str) -> None:
    """x times a number (), in place. If it is 1, x is neither read nor written; on CUDA the kernel
    reads the number, so that nobody waits for it."""
    if impl != "torch":
        launchers("triton", x.device).scale_(x, factor)
    elif x.device.type != "cpu" or factor != 1:
        x.mul_(factor)


def has_wide_products(x: Tensor) -> bool:
    """Whether a product of 16-bit matrices like x can return its float32 sums unrounded."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if has_wide_products(a) else torch.mm(a, b)


def _add_product(total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """total = dz^T h, or += after the first chunk, without a second tensor of total's size: where a
    product cannot be added to float32 by itself, it is made in blocks, converted, and added."""
    if total.dtype == dz.dtype:
        torch.mm(dz.t(), h, out=total) if first else total.addmm_(dz.t(), h)
    elif has_wide_products(dz) and first:
        torch.mm(dz.t(), h, out_dtype=total.dtype, out=total)
    elif has_wide_products(dz) and HAS_WIDE_ADDMM:
        torch.addmm(total, dz.t(), h, out_dtype=total.dtype, out=total)
    else:
        for block, columns in zip(total.split(VOCAB_BLOCK), dz.split(VOCAB_BLOCK, 1), strict=True):
            product = _product(columns.t(), h)
            block.copy_(product) if first else block.add_(product.to(block.dtype))


class _LinearKlDiv(torch.autograd.Function):
    """The operator's autograd; not registered with it, because it scales outputs in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, row_weights: Tensor | None, reduction: str, kind: str,
        *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        g = _factors(hidden, row_weights, reduction)
        loss, *gradients = OPERATORS[kind](hidden, weight, g, *options)
        return reduced(loss, row_weights, reduction), *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        hidden, weight, row_weights, ctx.reduction, ctx.kind, *needs = inputs[:7]
        ctx.chunk_rows, ctx.dtype, *target, ctx.impl = inputs[7:]
        ctx.save_for_backward(hidden, weight, row_weights, *target)
        ctx.early = output[1:] if any(needs) else None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward gets zeros, as large as dW

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, row_weights, *target = ctx.saved_tensors
        nothing = (None,) * (8 + len(target))
        if grad_loss is None:  # nothing depends on the loss
            return None, None, *nothing
        needs = ctx.needs_input_grad[:2]
        g = _factors(hidden, row_weights, ctx.reduction)
        grads, ctx.early = ctx.early, None  # scaled in place, so one backward alone may have them
        if grads is None or torch.is_grad_enabled():
            g = torch.where(g == 0, 0.0, g * grad_loss)  # of a mean over no rows: 0 * inf is NaN
            inputs = hidden, weight, g, *needs, ctx.chunk_rows, ctx.dtype, *target, ctx.impl
            _, *grads = first_derivative(OPERATORS[ctx.kind], *inputs)
        else:
            factor = torch.where(g.any(), grad_loss, 0.0)  # likewise
            for grad in grads:
                scale_(grad, factor, ctx.impl)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


def _factors(hidden: Tensor, row_weights: Tensor | None, reduction: str) -> Tensor:
    """g of (1), (N,): what the loss of each row counts, of stride 0 without weights. 0 for a row of
    weight 0, whatever the sum of weights is."""
    n, is_mean = hidden.shape[0], reduction == "batchmean"
    if row_weights is None:
        one = hidden.new_ones(1, dtype=compute_dtype(hidden.dtype))
        return (one / n if is_mean else one).expand(n)
    total = row_weights.sum() if is_mean else 1
    return torch.where(row_weights == 0, 0.0, row_weights / total)
