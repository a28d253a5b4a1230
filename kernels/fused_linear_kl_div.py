"""The LM head and the loss in one: the N x V logits never exist.

For hidden states h (N, C), the head's weight W (V, C), a target P, (V,) or (N, V), with |P| = sum P
per row, and an upstream gradient g of each row's loss,

    z = h W^T,    L = sum over rows of g KL(P || softmax(z))                           (1)
    dz = g (|P| softmax(z) - P)                                                        (2)
    dh = dz W,    dW = dz^T h                                                          (3)

Rows are taken in chunks. A chunk's logits lie in one buffer that all chunks reuse; the loss's
backward writes dz over them, and two matrix products make dh and add to dW. Beside the results only
one chunk is ever in memory, whatever N; a second one for a teacher given by its hidden states, or
for an (N, V) target of which rows of weight 0 are left out. (The idea is that of Liger's fused
linear cross-entropy; Cut Cross-Entropy, Wijmans et al. 2024, goes further and keeps no chunk.)

When the gradients are formed. For "batchmean" and "sum" the upstream gradient is one number, so the
forward computes (2) and (3) with g = 1, or the row's weight, while the chunk's logits are at hand,
and the first backward scales the results in place. Three cases compute the logits once more in the
backward instead, at the price of one more product: "none", where each row has an upstream gradient
of its own, which no scaling of dW can bring in afterwards; float16, whose range would lose dz
before the gradient scaler's factor reaches it; and a second backward over a retained graph.

Precision. Products run in the dtype of the arguments, or autocast's, and the loss in float32. On
CUDA, the products of (3) return their float32 sums where they would round to 16 bits: cuBLAS splits
the sum over V of dh, and would add the parts in 16 bits. The CPU's products have no such mode, and
no such split: each is rounded once. dW is accumulated over chunks in float32 (float64 for float64)
and returned in the weight's dtype. Rows of the buffer are a multiple of 64 elements long, so that
every row of a vocabulary of odd size starts on an aligned address: 50,304 for 50,257.

Traffic of loss and gradients in float32, N C left out. With n = N / chunk_rows chunks, rounded up:

    N V elements   z written, read by the loss, read and overwritten by dz, read twice       6
    V C elements   W read twice a chunk                                                    2 n
                   dW written by the first chunk, read and written by the others       2 n - 1
                   dW read and written when it is scaled                                     2

F.linear and the unfused loss take 16 and 3 (triton_kl_div.py has the 13 of the loss): chunks save
memory and cost V C.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .fused_kl_div import PACKED, empty_results, first_derivative, mean_of, pack, unpack, weighted
from .reference import compute_dtype
from .target import Target, TeacherTarget, check_head

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
    return_lse: bool = False,
    row_weights: Tensor | None = None,
) -> Any:
    """fused_kl_div(F.linear(hidden, weight), target, reduction) without the logits.

    Args:
        hidden: (..., C), the LM head's input.
        weight: (V, C), as F.linear takes it; of hidden's dtype, or any under autocast.
        target, reduction, impl, row_weights: as in fused_kl_div, for logits (..., V).
        chunk_rows: rows whose logits exist at a time; None: 2,048 on CUDA, 512 elsewhere.
        return_lse: return each row's log-sum-exp too, so that e^(z - lse) is the probability of any
            token whose logit z the caller computes. It carries no gradient, and means nothing in a
            row of weight 0.

    Returns:
        The loss, a tensor in float32 (float64 for float64 arguments), first derivatives in reverse
        mode only. With return_lse the pair of it and lse, (...) and of the same dtype; with a
        TeacherTarget the triple of it, lse and lse_target, (...), the log-sum-exp of the teacher's
        t + b: the target itself gives a token the probability e^(t + b - lse_target).

    Raises:
        TypeError, ValueError, RuntimeError: as fused_kl_div.
    """
    check_head(hidden, weight)
    dtype = _product_dtype(hidden, weight)
    arguments.refuse_forward_mode("fused_linear_kl_div", hidden, weight)
    leading = hidden.shape[:-1]
    shape = torch.Size((*leading, weight.shape[0]))
    target = arguments.resolve_target(target, shape, hidden.device, reduction)
    weights = arguments.resolve_row_weights(row_weights, leading, hidden.device)
    impl = arguments.resolve_impl(impl, hidden.device, dtype)
    if chunk_rows is None:
        chunk_rows = CUDA_CHUNK_ROWS if hidden.is_cuda else CHUNK_ROWS
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    rows = hidden.reshape(math.prod(leading), hidden.shape[-1])  # (N, C)
    sum_rows = reduction != "none"
    early = sum_rows and dtype != torch.float16 and torch.is_grad_enabled()
    needs = early and hidden.requires_grad, early and weight.requires_grad
    if weights is not None:
        weights = weights.to(compute_dtype(dtype))
    kind, p, *packed = pack(target, dtype, impl)
    teacher_weight = target.weight if isinstance(target, TeacherTarget) else None
    if teacher_weight is not None:
        p = p.to(_product_dtype(p, teacher_weight))
    loss, lse, norm, *_ = _LinearKlDiv.apply(
        rows, weight, weights, sum_rows, *needs, teacher_weight, chunk_rows, dtype, kind, p, *packed
    )
    loss = mean_of(loss, reduction, rows.shape[0], weights) if sum_rows else loss.view(leading)
    if not return_lse:
        return loss
    if isinstance(target, TeacherTarget):
        return loss, lse.view(leading), norm[:, 0].view(leading)
    return loss, lse.view(leading)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply; TypeError if it would not."""
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # "meta" would be an error
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one, or use torch.autocast"
        )
    return hidden.dtype


@torch.library.custom_op(
    "kernels::linear_kl_div",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? g, bool need_hidden, bool need_weight, "
    f"Tensor? teacher_weight, SymInt chunk_rows, ScalarType dtype, {PACKED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    g: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    teacher_weight: Tensor | None,
    chunk_rows: int,
    dtype: torch.dtype,
    kind: str,
    p: Tensor,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, norm per row, as kl_div_forward has them; dh and dW of (3) if needed, else (0,).

    hidden is (N, C); g is that of (2), (N,), None for 1; a row where it is 0 reaches no gradient,
    whatever is in it, and is left out on the CPU, where g can be looked at without waiting. dtype
    is that of the products. With a teacher_weight, p is the teacher's hidden states.
    """
    (n, width), vocab = hidden.shape, weight.shape[0]
    padded = (vocab + 63) // 64 * 64
    buffer = hidden.new_empty((min(chunk_rows, n), padded), dtype=dtype)[:, :vocab]
    loss, lse, norm = empty_results(hidden, dtype, kind)
    grad_hidden = hidden.new_empty((n, width) if need_hidden else 0)
    # Unwritten until the first chunk; zero if there are no rows.
    grad_weight = (loss.new_empty if n else loss.new_zeros)((vocab, width) if need_weight else 0)
    upstream = loss.new_ones(1).expand(n) if g is None else g
    chunks: Any = [slice(start, min(start + chunk_rows, n)) for start in range(0, n, chunk_rows)]
    on_cpu = hidden.device.type == "cpu"
    if g is not None and on_cpu and not g.all():
        chunks = g.nonzero().squeeze(1).split(chunk_rows)
        for x in (loss, lse, norm, grad_hidden):
            x.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(dtype)  # (V, C)
        if teacher_weight is not None:
            teacher_weight = teacher_weight.to(p.dtype)
            teacher_buffer = buffer.new_empty((len(buffer), padded), dtype=p.dtype)[:, :vocab]
        for i, rows in enumerate(chunks):
            h = hidden[rows].to(dtype)  # (R, C)
            p_rows = p[rows] if p.ndim == 2 else p
            if teacher_weight is not None:  # (R, C) -> (R, V)
                p_rows = torch.mm(p_rows, teacher_weight.t(), out=teacher_buffer[: len(h)])
            z = torch.mm(h, w.t(), out=buffer[: len(h)])  # (1): (R, V)
            kernels, target = unpack(z, kind, p_rows, *packed)
            loss[rows], lse[rows], norm[rows] = kernels.forward(z, target)
            arguments.refuse_negative(loss[rows], target)
            if need_hidden or need_weight:  # (2), over z
                kernels.backward(z, lse[rows], norm[rows], target, upstream[rows], z)
            if need_hidden:
                grad_hidden[rows] = _product(z, w).to(hidden.dtype)  # (3): (R, C)
            if need_weight:
                if g is not None and not on_cpu:  # 0 * NaN would be NaN
                    h = h.masked_fill(g[rows, None] == 0, 0.0)
                _add_product(grad_weight, z, h, first=i == 0)  # (3): (V, C)
    return loss, lse, norm, grad_hidden, grad_weight.to(weight.dtype)


@linear_kl_div.register_fake
def _(
    hidden: Tensor, weight: Tensor, g: Any, need_hidden: bool, need_weight: bool, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, dtype, kind, *_ = rest
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    return *empty_results(hidden, dtype, kind), grad_hidden, grad_weight


def has_wide_products(x: Tensor) -> bool:
    """Whether a product of 16-bit matrices like x can return its float32 sums unrounded."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if has_wide_products(a) else torch.mm(a, b)


def _add_product(total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """total = dz^T h, or += after the first chunk, without a second tensor of total's size.

    Where a product cannot be added to float32 by itself, it is made in blocks, converted if it has
    16 bits, and added: ATen adds tensors of two dtypes element by element.
    """
    if total.dtype == dz.dtype:
        torch.mm(dz.t(), h, out=total) if first else total.addmm_(dz.t(), h)
    elif has_wide_products(dz) and first:
        torch.mm(dz.t(), h, out_dtype=total.dtype, out=total)
    elif has_wide_products(dz) and HAS_WIDE_ADDMM:
        torch.addmm(total, dz.t(), h, out_dtype=total.dtype, out=total)
    else:
        for start in range(0, len(total), VOCAB_BLOCK):
            block = slice(start, start + VOCAB_BLOCK)
            product = _product(dz[:, block].t(), h)
            if first:
                total[block] = product
            else:
                total[block] += product.to(total.dtype)


class _LinearKlDiv(torch.autograd.Function):
    """The operator's autograd; not registered with it, because it scales outputs in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, row_weights: Tensor | None, sum_rows: bool, *options: Any
    ) -> tuple[Tensor, ...]:
        loss, *rest = linear_kl_div(hidden, weight, row_weights, *options)
        loss = weighted(loss, row_weights)
        return loss.sum() if sum_rows else loss, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        hidden, weight, row_weights, _, *needs, teacher_weight = inputs[:7]
        *ctx.options, p, aux, table = inputs[7:13]
        ctx.levels = inputs[13:]
        ctx.save_for_backward(hidden, weight, row_weights, teacher_weight, p, aux, table)
        ctx.is_early, ctx.early = any(needs), output[3:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward gets zeros, as large as dW

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # nothing depends on the loss
            return (None,) * 16
        needs = ctx.needs_input_grad[:2]
        grads, ctx.early = ctx.early, None  # scaled in place, so one backward alone may have them
        late = torch.is_grad_enabled() or not ctx.is_early
        if late or grads is None:
            hidden, weight, g, teacher_weight, *tensors = ctx.saved_tensors
            if late:
                upstream = grad_loss.expand(hidden.shape[0])
                g = upstream if g is None else g * upstream
            *_, grad_hidden, grad_weight = first_derivative(
                "fused_linear_kl_div", linear_kl_div, hidden, weight, g, *needs, teacher_weight,
                *ctx.options, *tensors, *ctx.levels,
            )  # fmt: skip
            grads = grad_hidden, grad_weight
        if not late:
            grads = [grad.mul_(grad_loss) for grad in grads]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 14
