"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Three operators stand below it, all on logits of shape (N, V):

    kernels::kl_div_forward    -> loss (N,), lse (N,)
    kernels::kl_div_backward   -> dKL/dz times grad_loss, a new tensor (N, V)
    kernels::kl_div_backward_  the same, written over the logits (inplace_backward)

They are registered with torch.library, each with a fake kernel (shapes only), so torch.compile sees
one opaque call instead of breaking the graph, and losses run on the meta device. An operator takes
tensors and numbers only: a target travels as `target` (its mask, or probabilities), `index` (ids of
the target tokens), alpha and beta. `impl` names the path: "triton" or "torch".
"""

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import torch_kl_div
from .reference import compute_dtype
from .target import Target, TwoLevelTarget

IMPLS = ("triton", "torch")
REDUCTIONS = ("batchmean", "sum", "none")


def fused_kl_div(
    logits: Tensor,
    target: Target,
    reduction: str = "batchmean",
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """KL(P || softmax(logits)) in nats, where P is the target; log-softmax and KL in one pass.

    Args:
        logits: (..., V), float32, bfloat16, float16 or (not with Triton) float64. Read without a
            copy if the last dimension is contiguous and one stride spans the rows.
        target: a TwoLevelTarget, or probabilities (V,) or (..., V). No gradient flows to it.
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value per row, (...)).
        inplace_backward: the backward writes the gradient over the logits, which saves a tensor of
            their size. They are lost then: a second backward, or one that needs them, raises.
        impl: "triton" (the default for CUDA tensors) or "torch" (for all others).

    Returns:
        The loss in float32 (float64 for float64 logits), first derivatives only.

    Raises:
        TypeError, ValueError: a bad argument: what was got, what was expected.
        RuntimeError: the path asked for cannot run here (nothing falls back silently), or a second
            derivative is asked for.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits must be a floating-point tensor (..., V), got {got}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    target = resolve_target(target, logits.shape, logits.device, reduction)
    impl = resolve_impl(impl, logits.device, logits.dtype)
    rows = _as_rows(logits, inplace_backward)
    loss, *_ = kl_div_forward(rows, *pack(target, rows.shape), inplace_backward, impl)
    if reduction == "none":
        return loss.view(logits.shape[:-1])
    # Not loss.mean(): the gradient of a sum is one number, which the backward reads as such.
    return loss.sum() if reduction == "sum" else loss.sum() / loss.shape[0]


def resolve_target(
    target: Target, shape: torch.Size, device: torch.device, reduction: str
) -> Target:
    """Return the target on the device of logits of this shape (..., V); TypeError or ValueError if
    it cannot be theirs, or if there is no such reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    vocab = shape[-1]
    if isinstance(target, TwoLevelTarget):
        if target.vocab_size != vocab:
            raise ValueError(
                f"the target's vocabulary must be that of the logits, {vocab}; "
                f"got a mask of {target.vocab_size} tokens"
            )
        return target.to(device)
    if not isinstance(target, Tensor) or not target.is_floating_point():
        got = getattr(target, "dtype", type(target).__name__)
        raise TypeError(
            "target must be a TwoLevelTarget or a floating-point tensor of probabilities, "
            f"got {got}; wrap a mask as TwoLevelTarget(mask)"
        )
    if target.shape not in ((vocab,), shape):
        raise ValueError(
            f"a dense target must have shape ({vocab},) or that of the logits, {tuple(shape)}; "
            f"got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(
            f"target is on {target.device}, logits on {device}; move it once, outside the loop"
        )
    if target.requires_grad:
        raise ValueError("target requires grad, but no gradient flows to it; pass target.detach()")
    return target


def resolve_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name the path for logits of this device and dtype; ValueError or TypeError if none."""
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
    """Take a target of logits of this shape (N, V) apart, as the operators take it."""
    if isinstance(target, TwoLevelTarget):
        return target.mask, target.index, target.alpha, target.beta
    return (target if target.ndim == 1 else target.reshape(shape)), None, 0.0, 0.0


def unpack(target: Tensor, index: Tensor | None, alpha: float, beta: float) -> Target:
    """The inverse of pack."""
    if index is None:
        return target
    return TwoLevelTarget.from_parts(target, index, alpha, beta)


def launchers(impl: str, device: torch.device) -> ModuleType:
    """Import the module that has forward(logits, target) -> loss, lse, norm and
    backward(logits, lse, norm, target, grad_loss, out)."""
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp per row, (N,) each, and norm, what the backward needs besides."""
    return launchers(impl, logits.device).forward(logits, unpack(target, index, alpha, beta))


@kl_div_forward.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
    norm = loss.new_empty(0 if rest[-1] == "torch" else loss.shape)
    return loss, torch.empty_like(loss), norm


@torch.library.custom_op("kernels::kl_div_backward", mutates_args=())
def kl_div_backward(
    logits: Tensor,
    lse: Tensor,
    norm: Tensor,
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
    launchers(impl, logits.device).backward(logits, lse, norm, p, grad_loss, out)
    return out


@kl_div_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))


@torch.library.custom_op("kernels::kl_div_backward_", mutates_args=("logits",))
def kl_div_backward_(
    logits: Tensor,
    lse: Tensor,
    norm: Tensor,
    target: Tensor,
    index: Tensor | None,
    alpha: float,
    beta: float,
    grad_loss: Tensor,
    impl: str,
) -> None:
    """The gradient of the logits, over the logits."""
    p = unpack(target, index, alpha, beta)
    launchers(impl, logits.device).backward(logits, lse, norm, p, grad_loss, logits)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, index, ctx.alpha, ctx.beta, ctx.inplace, ctx.impl = inputs
    ctx.save_for_backward(logits, *output[1:], target, index)
    ctx.mark_non_differentiable(*output[1:])


def _first_derivative(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, lse, norm, target, index = ctx.saved_tensors
    arguments = lse, norm, target, index, ctx.alpha, ctx.beta, grad_loss, ctx.impl
    if not ctx.inplace:
        return kl_div_backward(logits, *arguments), *(None,) * 6
    if torch.is_grad_enabled():  # create_graph=True would keep logits that are overwritten here
        _refuse_second_derivative()
    grad = logits.detach()
    kl_div_backward_(grad, *arguments)
    return grad, *(None,) * 6


def _refuse_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fused_kl_div has first derivatives only, got a request for a second one "
        "(create_graph=True); use kernels.reference.kl_div, which has all"
    )


kl_div_forward.register_autograd(_first_derivative, setup_context=_save_for_backward)
kl_div_backward.register_autograd(_refuse_second_derivative)
