"""Targets: the distribution over the vocabulary that the model is pulled toward.

    V     vocabulary size
    S     the target tokens, |S| of them
    P     target probabilities: alpha on S, beta elsewhere, |S| alpha + (V - |S|) beta = 1

A two-level target is a mask and two numbers, so no N x V matrix of probabilities is ever built: the
Triton kernels read one bit per token, from a table that all rows share (bitmask.py). A dense
target is a tensor of probabilities: (V,) for all rows of the logits, or one row for each of theirs.
"""

import math

import torch
from torch import Tensor


class TwoLevelTarget:
    """Probability alpha on each target token and beta on every other token.

    Args:
        mask: bool (V,), on any device that holds data; True on the target tokens. It is copied.
        alpha, beta: relative weights, alpha > beta >= 0; scaled so that P sums to 1.

    Attributes:
        mask: bool (V,).
        index: int64 (|S|,), the ids of the target tokens, ascending.
        alpha, beta: the normalised probabilities.
        sum_p_log_p: sum over the vocabulary of P log P in nats, with 0 log 0 = 0.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: mask is not one-dimensional, is all True or all False, or is on "meta"; a
            weight is negative or not finite; alpha <= beta.
    """

    def __init__(self, mask: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"mask must be a bool tensor (V,), got {got}; use mask.bool()")
        if mask.ndim != 1 or mask.is_meta:
            raise ValueError(
                f"mask must be one-dimensional (V,) and hold data, got {tuple(mask.shape)} "
                f"on {mask.device}; build the target on a real device, then call .to(device)"
            )
        if not (math.isfinite(alpha) and math.isfinite(beta) and alpha > beta >= 0):
            raise ValueError(
                f"weights must be finite with alpha > beta >= 0, got {alpha=}, {beta=}; "
                "alpha is the weight of a target token, beta that of every other token"
            )
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward
            mask = mask.clone()
            index = mask.nonzero().squeeze(1)
        size, vocab = index.numel(), mask.numel()
        if not 0 < size < vocab:
            raise ValueError(
                f"mask must select some tokens and not all, got {size} of {vocab}; "
                "check the rule that chose them"
            )
        ratio = beta / alpha  # before any sum of weights, which could overflow
        total = size + (vocab - size) * ratio
        self._set(mask, index, 1 / total, ratio / total)

    @classmethod
    def from_parts(cls, mask: Tensor, index: Tensor, alpha: float, beta: float) -> "TwoLevelTarget":
        """Build from these attributes, unchecked: no copy, no host synchronisation."""
        target = cls.__new__(cls)
        target._set(mask, index, alpha, beta)
        return target

    def _set(self, mask: Tensor, index: Tensor, alpha: float, beta: float) -> None:
        self.mask, self.index, self.alpha, self.beta = mask, index, alpha, beta
        others = self.vocab_size - self.size
        beta_log_beta = beta * math.log(beta) if beta > 0 else 0.0
        self.sum_p_log_p = self.size * alpha * math.log(alpha) + others * beta_log_beta
        self._on_device: dict[torch.device, TwoLevelTarget] = {}

    @property
    def size(self) -> int:
        """|S|, the number of target tokens."""
        return self.index.numel()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.mask.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P as a tensor (V,) on the device of the mask."""
        p = torch.full((self.vocab_size,), self.beta, dtype=dtype, device=self.mask.device)
        return p.masked_fill_(self.mask, self.alpha)

    def to(self, device: torch.device | str) -> "TwoLevelTarget":
        """Return the same target on another device; the copy is kept, so later calls are free."""
        device = torch.device(device)
        if device == self.mask.device:
            return self
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = TwoLevelTarget.from_parts(
                    self.mask.to(device), self.index.to(device), self.alpha, self.beta
                )
        return self._on_device[device]

    def __repr__(self) -> str:
        return (
            f"TwoLevelTarget({self.size} of {self.vocab_size} tokens, alpha={self.alpha:.6g}, "
            f"beta={self.beta:.6g}, device={str(self.mask.device)!r})"
        )


Target = TwoLevelTarget | Tensor  # a tensor holds probabilities: (V,), or the logits' shape
