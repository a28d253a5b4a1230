"""KL(P || softmax(z)) as PyTorch spells it: log_softmax, then kl_div. The definition, unfused.

    KL = sum over the vocabulary of P (log P - log_softmax(z))                        in nats

P is the target's probabilities, which are softmax(t) for the logits t of a teacher. The tests bound
the error of every other path by the error of this one in the same dtype; the benchmark calls it
"unfused". Where P = 0 and a logit is -inf, PyTorch's term is 0 * -inf = NaN; the fused paths' is 0.

Summing over the last dimension and then averaging over rows avoids two traps: F.kl_div's own
"batchmean" divides by the first dimension only, and its "mean" by rows times vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .target import Target, TeacherTarget

REDUCTIONS = ("batchmean", "sum", "none")


def kl_div(logits: Tensor, target: Target, reduction: str = "batchmean") -> Tensor:
    """KL(P || softmax(logits)) in nats, where P is the target.

    Args:
        logits: (..., V), any floating dtype; computed in float32, or in float64 if that is theirs.
        target: a TwoLevelTarget, a TeacherTarget, or probabilities (V,) or (..., V), which are
            scaled to sum to 1.
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value per row, (...)).
    """
    check_reduction(reduction)
    dtype = compute_dtype(logits.dtype)
    log_q = F.log_softmax(logits, dim=-1, dtype=dtype)
    if isinstance(target, TeacherTarget):
        p = F.softmax(target.whole_logits(dtype), dim=-1)
    elif isinstance(target, Tensor):
        p = target.to(dtype) / target.to(dtype).sum(-1, keepdim=True)
    else:
        p = target.to(logits.device).dense(dtype)
    loss = F.kl_div(log_q, p, reduction="none").sum(-1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def check_reduction(reduction: str) -> None:
    """ValueError unless it is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be one of {REDUCTIONS}, got {reduction!r}; pass "batchmean" for the '
            "mean over all rows (of logits (B, T, V), F.kl_div's own divides by B alone)"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
