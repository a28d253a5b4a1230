"""KL(P || softmax(z)) as PyTorch spells it: log_softmax, then kl_div. The definition, unfused.

    KL = sum over the vocabulary of P (log P - log_softmax(z))                        in nats

The tests hold every other path to the error that this one makes in the same dtype, and the
benchmark calls it "unfused". One difference is left as PyTorch has it: where P = 0 and a logit is
-inf, the term is 0 * -inf = NaN here, and 0 in the fused paths.

Two traps, both avoided by summing over the last dimension and then averaging over rows:
F.kl_div's own "batchmean" divides by the first dimension only, its "mean" by rows times vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .target import Target, TwoLevelTarget

REDUCTIONS = ("batchmean", "sum", "none")


def kl_div(logits: Tensor, target: Target, reduction: str = "batchmean") -> Tensor:
    """KL(P || softmax(logits)) in nats, P the target.

    Args:
        logits: (..., V), any floating dtype; computed in float32, float64 stays float64.
        target: a TwoLevelTarget, or probabilities (V,) or (..., V).
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value a row, (...)).

    Raises:
        TypeError, ValueError: what was got, what was expected.
    """
    check_logits(logits)
    target = resolve_target(target, logits.shape, logits.device, reduction)
    dtype = compute_dtype(logits.dtype)
    p = target.dense(dtype) if isinstance(target, TwoLevelTarget) else target.to(dtype)
    log_q = F.log_softmax(logits, dim=-1, dtype=dtype)
    return reduce_rows(F.kl_div(log_q, p, reduction="none").sum(-1), reduction)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_rows(loss: Tensor, reduction: str) -> Tensor:
    """One value a row, reduced; the mean over no rows is NaN, as PyTorch's losses have it."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def check_logits(logits: Tensor) -> None:
    """TypeError or ValueError unless these are floating-point logits (..., V)."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits must be a floating-point tensor (..., V), got {got}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")


def resolve_target(
    target: Target, shape: torch.Size, device: torch.device, reduction: str
) -> Target:
    """The target on the device of logits of this shape (..., V); TypeError or ValueError if it
    cannot be theirs, or if there is no such reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    vocab = shape[-1]
    if isinstance(target, TwoLevelTarget):
        if target.vocab_size != vocab:
            raise ValueError(
                f"the target's vocabulary must be that of the logits, {vocab}; "
                f"got members for {target.vocab_size} tokens"
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
