"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Three operators stand below it, all on logits of shape (N, V):

    kernels::kl_div_forward    -> loss (N,), lse (N,)
    kernels::kl_div_backward   -> dKL/dz times grad_loss, a new tensor (N, V)
    kernels::kl_div_backward_  the same, written over the logits (inplace_backward)

They are registered with torch.library, each with a fake kernel (the shapes alone), so torch.compile
sees one opaque call instead of breaking the graph, and losses run on the meta device. An operator
takes tensors and numbers only: a target travels as `target` (bool members, or probabilities),
`index` (positions of the members), alpha and beta. `impl` names the path: "triton" or "torch".

The second derivative is the first derivative of kl_div_backward, written below in ordinary PyTorch
operations: right to any order, and not fused. With q = softmax(z) and g the upstream gradient of a
row's loss, that operator gives G = g (|P| q - P). For an upstream gradient v of G, (N, V),

    d<G, v>/dz = g |P| q (v - <q, v>),    |P| = sum P,    <a, b> = sum of a b over the row   (1)
    d<G, v>/dg = |P| <q, v> - <P, v>                                                         (2)

Guarded. The test in tests/ that fails when the line is wrong:

    (1) (2)  test_autograd.py::test_first_and_second_derivatives_pass_gradcheck
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference, torch_kl_div
from .reference import check_logits, compute_dtype, reduce_rows, resolve_target
from .target import Target, TwoLevelTarget

IMPLS = ("triton", "torch", "reference")


def fused_kl_div(
    logits: Tensor,
    target: Target,
    reduction: str = "batchmean",
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """KL(P || softmax(logits)) in nats, P the target; log-softmax and KL in one pass.

    Args:
        logits: (..., V), float32, bfloat16, float16 or (not with Triton) float64. Read where they
            lie if the last dimension is contiguous and the rows lie at one stride, else copied.
        target: a TwoLevelTarget, or probabilities (V,) or (..., V). No gradient flows to it.
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value a row, (...)).
        inplace_backward: the backward writes the gradient over the logits, which saves a tensor of
            their size. They are lost then: a second backward, or one that needs them, raises.
        impl: "triton" (the default for CUDA tensors), "torch" (for all others) or "reference".

    Returns:
        The loss in float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: what was got, what was expected.
        RuntimeError: the path asked for cannot run here; none falls back to another silently.
    """
    check_logits(logits)
    target = resolve_target(target, logits.shape, logits.device, reduction)
    impl = resolve_impl(impl, logits.device, logits.dtype)
    if impl == "reference":
        if inplace_backward:
            raise ValueError('inplace_backward=True needs a fused path, got impl="reference"')
        return reference.kl_div(logits, target, reduction)
    rows = _as_rows(logits, inplace_backward)
    loss, _ = kl_div_forward(rows, *pack(target, rows.shape), inplace_backward, impl)
    return reduce_rows(loss.view(logits.shape[:-1]), reduction)


def resolve_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The path for logits of this device and dtype; ValueError or TypeError if there is none."""
    if impl is None:
        impl = "triton" if device.type == "cuda" else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS} or None, got {impl!r}")
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if impl != "triton":
        allowed.append(torch.float64)
    if dtype not in allowed:
        raise TypeError(f"impl={impl!r} takes logits of {allowed}, got {dtype}")
    return impl


def _as_rows(logits: Tensor, inplace: bool) -> Tensor:
    """(N, V) with a contiguous last dimension and rows that do not overlap; copied if need be."""
    vocab = logits.shape[-1]
    shape = logits.numel() // vocab, vocab
    if not inplace:
        rows = logits.reshape(shape)
        apart = rows.stride(1) == 1 and (shape[0] <= 1 or rows.stride(0) >= vocab)
        return rows if apart else rows.contiguous()
    if logits.stride(-1) == 1 and min(logits.stride()[:-1], default=vocab) >= vocab:
        try:
            return logits.view(shape)
        except RuntimeError:  # leading dimensions that no single stride spans
            pass
    raise ValueError(
        "inplace_backward=True needs logits with a contiguous last dimension and rows at one "
        f"stride, got shape {tuple(logits.shape)} with strides {logits.stride()}"
    )


def pack(target: Target, shape: torch.Size) -> tuple[Tensor, Tensor | None, float, float]:
    """The target of logits of this shape (N, V), as the operators take it."""
    if isinstance(target, TwoLevelTarget):
        return target.members, target.index, target.alpha, target.beta
    return (target if target.ndim == 1 else target.reshape(shape)), None, 0.0, 0.0


def unpack(target: Tensor, index: Tensor | None, alpha: float, beta: float) -> Target:
    """The inverse of pack."""
    if index is None:
        return target
    return TwoLevelTarget.from_parts(target, index, alpha, beta)


def launchers(impl: str, device: torch.device) -> ModuleType:
    """The module with forward(logits, target) and backward(logits, lse, target, grad_loss, out)."""
    if impl == "torch":
        return torch_kl_div
    try:
        import triton  # here and not above: the package works without it

        from . import triton_launch
    except ImportError as error:
        raise RuntimeError(
            'impl="triton" needs Triton, which is not installed; install it or pass impl="torch"'
        ) from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f'impl="triton" needs CUDA tensors, got {device}; pass impl="torch", or set '
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
    return triton_launch


@torch.library.custom_op("kernels::kl_div_forward", mutates_args=())
def kl_div_forward(
    logits: Tensor,
    target: Tensor,
    index: Tensor | None,
    alpha: float,
    beta: float,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, (N,) each."""
    return launchers(impl, logits.device).forward(logits, unpack(target, index, alpha, beta))


@kl_div_forward.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


@torch.library.custom_op("kernels::kl_div_backward", mutates_args=())
def kl_div_backward(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    index: Tensor | None,
    alpha: float,
    beta: float,
    grad_loss: Tensor,
    impl: str,
) -> Tensor:
    """The gradient of the logits as a new tensor (N, V), in their dtype."""
    out = torch_kl_div.empty_gradient(logits)
    p = unpack(target, index, alpha, beta)
    launchers(impl, logits.device).backward(logits, lse, p, grad_loss, out)
    return out


@kl_div_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))


@torch.library.custom_op("kernels::kl_div_backward_", mutates_args=("logits",))
def kl_div_backward_(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    index: Tensor | None,
    alpha: float,
    beta: float,
    grad_loss: Tensor,
    impl: str,
) -> None:
    """The gradient of the logits, over the logits."""
    p = unpack(target, index, alpha, beta)
    launchers(impl, logits.device).backward(logits, lse, p, grad_loss, logits)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, target, index, ctx.alpha, ctx.beta, ctx.inplace, ctx.impl = inputs
    ctx.save_for_backward(logits, output[1], target, index)
    ctx.mark_non_differentiable(output[1])


def _first_derivative(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, lse, target, index = ctx.saved_tensors
    arguments = lse, target, index, ctx.alpha, ctx.beta, grad_loss, ctx.impl
    if not ctx.inplace:
        return kl_div_backward(logits, *arguments), *(None,) * 6
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward=True overwrites the logits that a second derivative needs; "
            "pass inplace_backward=False where create_graph=True"
        )
    grad = logits.detach()
    kl_div_backward_(grad, *arguments)
    return grad, *(None,) * 6


def _save_for_second_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, _, target, index, ctx.alpha, ctx.beta, grad_loss, _ = inputs
    ctx.save_for_backward(logits, target, index, grad_loss)


def _second_derivative(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """(1) for the logits and (2) for grad_loss."""
    logits, target, index, grad_loss = ctx.saved_tensors
    p = unpack(target, index, ctx.alpha, ctx.beta)
    dtype = compute_dtype(logits.dtype)
    p = p.dense(dtype) if isinstance(p, TwoLevelTarget) else p.to(dtype)
    sum_p = p.sum(-1, keepdim=True)
    q, v = torch.softmax(logits, -1, dtype=dtype), v.to(dtype)
    qv = (q * v).sum(-1, keepdim=True)
    grad_logits = grad_loss.unsqueeze(-1) * sum_p * q * (v - qv)  # (1)
    grad_grad = (sum_p * qv).squeeze(-1) - (p * v).sum(-1)  # (2)
    return grad_logits.to(logits.dtype), *(None,) * 5, grad_grad, None


kl_div_forward.register_autograd(_first_derivative, setup_context=_save_for_backward)
kl_div_backward.register_autograd(_second_derivative, setup_context=_save_for_second_backward)
