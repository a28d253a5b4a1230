"""Argument checks of the two public losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import check_reduction, compute_dtype
from .target import TeacherTarget, TwoLevelTarget, described

MODULES = {"triton": "triton_launch", "triton-simple": "triton_simple", "torch": "torch_kl_div"}


def resolve(
    target: Any, reduction: str, impl: str | None, row_weights: Any,
    shape: torch.Size, device: torch.device, dtype: torch.dtype,
) -> tuple[TwoLevelTarget | TeacherTarget, str, Tensor | None]:  # fmt: skip
    """Check the arguments for logits of this shape (..., V), device and dtype. Return the target,
    probabilities as a teacher's logits; the name of the path; the weights as (N,), in the dtype of
    the loss."""
    check_reduction(reduction)
    wide, is_dense = compute_dtype(dtype), getattr(target, "layout", None) == torch.strided
    if is_dense and target.is_floating_point():
        log_p = target.detach().to(wide).log()
        target = TeacherTarget(log_p.expand(shape) if log_p.shape == shape[-1:] else log_p)
    if isinstance(target, TwoLevelTarget):
        fits, target = target.vocab_size == shape[-1], target.to(device)
    elif isinstance(target, TeacherTarget):
        fits = target.shape == shape and target.device == device
    else:
        raise TypeError(
            "target must be a TwoLevelTarget(mask), a TeacherTarget or a dense floating-point "
            f"tensor of probabilities (see .to_dense()), got {described(target)}"
        )
    if not fits:
        raise ValueError(
            f"the target must fit logits of shape {tuple(shape)} on {device}, got {target}"
        )
    impl = resolve_impl(impl, device, dtype)
    if impl == "triton-simple" and isinstance(target, TeacherTarget):
        raise TypeError('impl="triton-simple" takes a TwoLevelTarget only; pass impl="triton"')
    if row_weights is None:
        return target, impl, None
    is_real = isinstance(row_weights, Tensor) and not row_weights.is_complex()
    placed = is_real and row_weights.shape == shape[:-1] and row_weights.device == device
    if not placed or row_weights.requires_grad:
        raise ValueError(
            f"row_weights must be a real, detached tensor {tuple(shape[:-1])} on {device}, one "
            f"weight per row; got {described(row_weights)}"
        )
    return target, impl, row_weights.reshape(-1).to(wide)


def resolve_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name the path for logits of this device and dtype; ValueError or TypeError if none."""
    if impl is None:
        return "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
    if impl not in MODULES:
        raise ValueError(f"impl must be one of {list(MODULES)} or None, got {impl!r}")
    if impl != "torch" and dtype == torch.float64:
        raise TypeError(f'impl={impl!r} takes no float64 logits; pass impl="torch"')
    return impl


def product_dtype(rows: Tensor, weight: Tensor, whose: str = "") -> torch.dtype:
    """The dtype in which F.linear multiplies these (N, C) and (V, C); ValueError if it does not."""
    try:
        empty = (
            torch.zeros(0, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (rows, weight)
        )
        return F.linear(*empty).dtype
    except RuntimeError as error:
        raise ValueError(
            f"{whose}hidden must be (..., C), weight (V, C), both of one dtype or under autocast "
            f"(which leaves float64 alone), on one device; got {described(rows)}, "
            f"{described(weight)}"
        ) from error
