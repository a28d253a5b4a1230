"""The LM head and the loss in one: the N x V logits never exist.

For hidden states h (N, C), the head's weight W (V, C), a target P, (V,) or (N, V), with |P| = sum P
a row, and an upstream gradient g of each row's loss,

    z = h W^T,    L = sum over rows of g KL(P || softmax(z))                           (1)
    dz = g (|P| softmax(z) - P)                                                        (2)
    dh = dz W,    dW = dz^T h                                                          (3)

Rows are taken in chunks. A chunk's logits lie in one buffer that all chunks reuse; the loss's
backward writes dz over them, and two matrix products make dh and add to dW. What stays beside the
results is one chunk, whatever N. (The idea is that of Liger's fused linear cross-entropy; Cut
Cross-Entropy, Wijmans et al. 2024, goes further and keeps no chunk.)

When the gradients are formed. For "batchmean" and "sum" every row has the same g, so the forward
computes (2) and (3) with g = 1 while the chunk's logits are at hand, and the first backward scales
the results in place by the upstream gradient. Three cases compute the logits once more in the
backward instead, at the price of one more product: "none", where each row has an upstream gradient
of its own, which no scaling of dW can bring in afterwards; float16, whose range would lose dz
before the gradient scaler's factor reaches it; and a second backward over a retained graph.

Precision. Products run in the dtype of the arguments, or autocast's; the loss in float32; dW is
accumulated over chunks in float32 (float64 for float64) whatever the dtype, and returned in the
weight's. Rows of the buffer are a multiple of 64 elements long, so that every row of a vocabulary
of odd size starts on an aligned address: 50,304 for 50,257.

Traffic of loss and gradients in float32, N C left out. With n = N / chunk_rows chunks, rounded up:

    N V elements   z written, read by the loss, read and overwritten by dz, read twice       6
    V C elements   W read twice a chunk                                                    2 n
                   dW written by the first chunk, read and written by the others       2 n - 1
                   dW read and written when it is scaled                                     2

F.linear and the unfused loss take 16 and 3 (kernels/triton_kl_div.py has the 13 of the loss): what
chunks save is memory, and what they cost is V C.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .fused_kl_div import launchers, pack, resolve_impl, resolve_target, unpack
from .reference import compute_dtype
from .target import Target

CHUNK_ROWS = 512  # 103 MB of float32 logits at V = 50,257
VOCAB_BLOCK = 8192  # rows of dW converted to float32 at a time


@overload
def fused_linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    reduction: str = ...,
    chunk_rows: int | None = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def fused_linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    reduction: str = ...,
    chunk_rows: int | None = ...,
    impl: str | None = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def fused_linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    reduction: str = "batchmean",
    chunk_rows: int | None = None,
    impl: str | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """fused_kl_div(F.linear(hidden, weight), target, reduction) without the logits.

    Args:
        hidden: (..., C), the LM head's input.
        weight: (V, C), as F.linear takes it; of hidden's dtype, or any under autocast.
        target: a TwoLevelTarget, or probabilities (V,) or (..., V). No gradient flows to it.
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value a row, (...)).
        chunk_rows: rows whose logits exist at a time; 512 if None.
        impl: "triton" (the default for CUDA tensors) or "torch" (for all others).
        return_lse: give back each row's log-sum-exp too, so that e^(z - lse) is the probability
            of any token whose logit z the caller works out. It carries no gradient.

    Returns:
        The loss in float32 (float64 for float64 arguments), first derivatives only; with
        return_lse the pair of it and lse, (...) and of the same dtype.

    Raises:
        TypeError, ValueError: what was got, what was expected.
        RuntimeError: the path asked for cannot run here, or a second derivative is asked for.
    """
    dtype = _product_dtype(hidden, weight)
    vocab, leading = weight.shape[0], hidden.shape[:-1]
    target = resolve_target(target, torch.Size((*leading, vocab)), hidden.device, reduction)
    impl = resolve_impl(impl, hidden.device, dtype)
    if chunk_rows is None:
        chunk_rows = CHUNK_ROWS
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    sum_rows = reduction != "none"
    early = sum_rows and dtype != torch.float16 and torch.is_grad_enabled()
    packed = pack(target, torch.Size((rows.shape[0], vocab)))
    loss, lse = _LinearKlDiv.apply(rows, weight, *packed, sum_rows, early, chunk_rows, dtype, impl)
    if reduction == "none":
        loss = loss.view(leading)
    elif reduction == "batchmean":
        loss = loss / rows.shape[0]
    return (loss, lse.view(leading)) if return_lse else loss


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply; TypeError or ValueError if it could not."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (..., C) and weight (V, C), as F.linear takes them; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one, or use torch.autocast"
        )
    return hidden.dtype


@torch.library.custom_op("kernels::linear_kl_div", mutates_args=())
def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    index: Tensor | None,
    alpha: float,
    beta: float,
    grad_loss: Tensor | None,
    sum_rows: bool,
    need_hidden: bool,
    need_weight: bool,
    chunk_rows: int,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, summed or a row (N,); lse (N,); dh and dW of (3) if needed, else (0,).

    hidden is (N, C); grad_loss (N,) is the g of (2), 1 for None; dtype that of the products.
    """
    p = unpack(target, index, alpha, beta)
    kernels = launchers(impl, hidden.device)
    (n, width), vocab = hidden.shape, weight.shape[0]
    padded = (vocab + 63) // 64 * 64
    buffer = hidden.new_empty((min(chunk_rows, n), padded), dtype=dtype)[:, :vocab]
    loss = hidden.new_empty(n, dtype=compute_dtype(dtype))
    lse = torch.empty_like(loss)
    grad_hidden = hidden.new_empty((n, width) if need_hidden else 0)
    # Unwritten until the first chunk; of no rows it is zero.
    grad_weight = (loss.new_empty if n else loss.new_zeros)((vocab, width) if need_weight else 0)
    if grad_loss is None:
        grad_loss = loss.new_ones(1).expand(n)
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(dtype)
        for start in range(0, n, chunk_rows):
            rows = slice(start, min(start + chunk_rows, n))
            h = hidden[rows].to(dtype)
            p_rows = p[rows] if isinstance(p, Tensor) and p.ndim == 2 else p
            z = torch.mm(h, w.t(), out=buffer[: len(h)])  # (1)
            loss[rows], lse[rows], norm = kernels.forward(z, p_rows)
            if need_hidden or need_weight:
                kernels.backward(z, lse[rows], norm, p_rows, grad_loss[rows], z)  # (2), over z
            if need_hidden:
                grad_hidden[rows] = z @ w  # (3)
            if need_weight:
                _add_product(grad_weight, z, h, first=start == 0)  # (3)
    return loss.sum() if sum_rows else loss, lse, grad_hidden, grad_weight.to(weight.dtype)


def _add_product(total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """total = dz^T h, or += after the first chunk, without a second tensor of total's size.

    ATen adds tensors of two dtypes element by element, so a product is converted before it is
    added, and where it is the first one converted in place of being added.
    """
    if total.dtype == dz.dtype:
        torch.mm(dz.t(), h, out=total) if first else total.addmm_(dz.t(), h)
        return
    for start in range(0, len(total), VOCAB_BLOCK):
        block = slice(start, start + VOCAB_BLOCK)
        product = dz[:, block].t() @ h
        if first:
            total[block] = product
        else:
            total[block] += product.to(total.dtype)


@linear_kl_div.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, sum_rows, need_hidden, need_weight, _, dtype, _ = rest
    lse = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(dtype))
    loss = lse.new_empty(() if sum_rows else lse.shape)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    return loss, lse, grad_hidden, grad_weight


class _LinearKlDiv(torch.autograd.Function):
    """The operator's autograd; not registered with it, for it scales an output in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        alpha, beta, sum_rows, ctx.is_early, *ctx.options = rest
        ctx.save_for_backward(hidden, weight, target, index)
        ctx.levels = alpha, beta
        early = [ctx.is_early and need for need in ctx.needs_input_grad[:2]]
        packed = target, index, *ctx.levels
        loss, lse, *ctx.early = linear_kl_div(
            hidden, weight, *packed, None, sum_rows, *early, *ctx.options
        )
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_kl_div has first derivatives only, and create_graph=True asks for "
                "more; use kernels.reference.kl_div(F.linear(hidden, weight), target)"
            )
        needs = ctx.needs_input_grad[:2]
        grads, ctx.early = ctx.early, None  # scaled in place, so one backward alone may have them
        if not ctx.is_early or grads is None:
            hidden, weight, target, index = ctx.saved_tensors
            upstream = None if ctx.is_early else grad_loss.expand(hidden.shape[0])
            packed = target, index, *ctx.levels
            _, _, *grads = linear_kl_div(
                hidden, weight, *packed, upstream, True, *needs, *ctx.options
            )
        if ctx.is_early:
            grads = [grad.mul_(grad_loss) for grad in grads]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9
