"""Argument checks of the two public losses."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import compute_dtype
from .target import Target, TeacherTarget, TwoLevelTarget

IMPLS = ("triton", "triton-simple", "torch")
REDUCTIONS = ("batchmean", "sum", "none")


def resolve_target(
    target: Target, shape: torch.Size, device: torch.device, dtype: torch.dtype, reduction: str
) -> TwoLevelTarget | TeacherTarget:
    """Return the target on the device of logits of this shape (..., V) and dtype; probabilities as
    a teacher's logits. TypeError or ValueError if it cannot be theirs, or for the reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be one of {REDUCTIONS}, got {reduction!r}; pass "batchmean" for the '
            "mean over all rows (of logits (B, T, V), F.kl_div's own divides by B alone)"
        )
    vocab = shape[-1]
    if isinstance(target, TwoLevelTarget):
        if target.vocab_size != vocab:
            raise ValueError(
                f"the target's vocabulary must be that of the logits, {vocab}; "
                f"got a mask of {target.vocab_size} tokens"
            )
        return target.to(device)
    if isinstance(target, TeacherTarget):
        if target.shape != shape or target.device != device:
            raise ValueError(
                f"a teacher's logits must have the shape of the student's, {tuple(shape)} on "
                f"{device}; got {tuple(target.shape)} on {target.device}"
            )
        return target
    if not isinstance(target, Tensor) or not target.is_floating_point():
        got = getattr(target, "dtype", type(target).__name__)
        raise TypeError(
            "target must be a TwoLevelTarget, a TeacherTarget or a floating-point tensor of "
            f"probabilities, got {got}; wrap a mask as TwoLevelTarget(mask)"
        )
    if target.layout != torch.strided:
        raise TypeError(f"target is {target.layout}; pass target.to_dense()")
    if target.shape not in ((vocab,), shape):
        raise ValueError(
            f"probabilities must have shape ({vocab},) or that of the logits, {tuple(shape)}; "
            f"got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(
            f"target is on {target.device}, logits on {device}; move it once, outside the loop"
        )
    log_p = target.detach().to(compute_dtype(dtype)).log()
    return TeacherTarget(log_p.expand(shape))


def resolve_row_weights(
    weights: Tensor | None, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Check the weights of rows of this shape (...); return them as (N,), in the loss's dtype."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != leading or weights.device != device:
        got = getattr(weights, "shape", type(weights).__name__)
        raise ValueError(
            f"row_weights must be a tensor {tuple(leading)} on {device}, one weight per row; "
            f"got {got if isinstance(got, str) else f'{tuple(got)} on {weights.device}'}"
        )
    if weights.requires_grad:
        raise ValueError("row_weights requires grad, but no gradient flows to it; detach it")
    return weights.reshape(-1).to(compute_dtype(dtype))


def resolve_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name the path for logits of this device and dtype; ValueError or TypeError if none."""
    if impl is None:
        impl = "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS} or None, got {impl!r}")
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if impl == "torch":
        allowed.append(torch.float64)
    if dtype not in allowed:
        raise TypeError(f"impl={impl!r} takes logits of {allowed}, got {dtype}")
    return impl


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply; TypeError if it would not."""
    device = hidden.device.type
    dtypes = [hidden.dtype, weight.dtype]
    if device != "meta" and torch.is_autocast_enabled(device):  # "meta" would be an error
        narrow = torch.get_autocast_dtype(device)
        dtypes = [dtype if dtype == torch.float64 else narrow for dtype in dtypes]
    if dtypes[0] != dtypes[1]:
        raise TypeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one, or use torch.autocast "
            "(which leaves float64 as it is)"
        )
    return dtypes[0]


def refuse_forward_mode(name: str, *arguments: Tensor) -> None:
    """RuntimeError for dual tensors, whose tangents the operators would drop silently."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        raise RuntimeError(
            f"{name} has reverse-mode derivatives only, got a dual tensor (jvp, jacfwd, hessian); "
            "use kernels.reference.kl_div, which has all"
        )
