"""What the model is pulled toward: a distribution over the vocabulary.

    V     vocabulary
    S     the member set, |S| tokens
    P     target probabilities: alpha on S, beta elsewhere, |S| alpha + (V - |S|) beta = 1

A two-level target is a membership vector and two numbers, so no N x V matrix of probabilities is
ever built: the Triton kernels read one bit a token, in a table that all rows share
(kernels/membership.py). A dense target is a tensor of probabilities, one row (V,) for all rows of
the logits or a row for each.
"""

import math

import torch
from torch import Tensor


class TwoLevelTarget:
    """Probability alpha on each member token and beta on each other token.

    Args:
        members: bool (V,), on any device that holds data; True where the token is a member.
        alpha, beta: relative weights, alpha > beta >= 0; scaled so that P sums to 1.

    Attributes:
        members: bool (V,).
        index: int64 (|S|,), the positions of the members, ascending.
        alpha, beta: the normalised probabilities.
        sum_p_log_p: sum over the vocabulary of P log P in nats, 0 log 0 = 0.

    Raises:
        TypeError: members is not a tensor of bool.
        ValueError: members is not one-dimensional, has no member or no non-member, or lies on
            "meta"; a weight is negative or not finite; alpha <= beta.
    """

    def __init__(self, members: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
        if not isinstance(members, Tensor) or members.dtype != torch.bool:
            got = getattr(members, "dtype", type(members).__name__)
            raise TypeError(f"members must be a bool tensor (V,), got {got}; use ids.bool()")
        if members.ndim != 1 or members.is_meta:
            raise ValueError(
                f"members must be one-dimensional (V,) and hold data, got {tuple(members.shape)} "
                f"on {members.device}; build the target on a real device, then call .to(device)"
            )
        if not (math.isfinite(alpha) and math.isfinite(beta) and alpha > beta >= 0):
            raise ValueError(
                f"weights must be finite with alpha > beta >= 0, got {alpha=}, {beta=}; "
                "alpha weighs a member, beta every other token"
            )
        index = members.nonzero().squeeze(1)
        size, vocab = index.numel(), members.numel()
        if not 0 < size < vocab:
            raise ValueError(
                f"members must be a proper, non-empty part of the vocabulary, got {size} of "
                f"{vocab} tokens; check the rule that picked them"
            )
        ratio = beta / alpha  # of the weights, so that no sum of theirs can overflow
        total = size + (vocab - size) * ratio
        self._set(members, index, 1 / total, ratio / total)

    @classmethod
    def from_parts(
        cls, members: Tensor, index: Tensor, alpha: float, beta: float
    ) -> "TwoLevelTarget":
        """The target with these attributes, unchecked: no copy, no host synchronisation."""
        target = cls.__new__(cls)
        target._set(members, index, alpha, beta)
        return target

    def _set(self, members: Tensor, index: Tensor, alpha: float, beta: float) -> None:
        self.members, self.index, self.alpha, self.beta = members, index, alpha, beta
        others = self.vocab_size - self.size
        beta_log_beta = beta * math.log(beta) if beta > 0 else 0.0
        self.sum_p_log_p = self.size * alpha * math.log(alpha) + others * beta_log_beta
        self._on_device: dict[torch.device, TwoLevelTarget] = {}

    @property
    def size(self) -> int:
        """|S|, the number of member tokens."""
        return self.index.numel()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.members.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P as a tensor (V,) on the device of the members."""
        p = torch.full((self.vocab_size,), self.beta, dtype=dtype, device=self.members.device)
        return p.masked_fill_(self.members, self.alpha)

    def to(self, device: torch.device | str) -> "TwoLevelTarget":
        """The same target on another device; copied once and kept, so later calls are free."""
        device = torch.device(device)
        if device == self.members.device:
            return self
        if device not in self._on_device:
            self._on_device[device] = TwoLevelTarget.from_parts(
                self.members.to(device), self.index.to(device), self.alpha, self.beta
            )
        return self._on_device[device]

    def __repr__(self) -> str:
        return (
            f"TwoLevelTarget({self.size} of {self.vocab_size} tokens, alpha={self.alpha:.6g}, "
            f"beta={self.beta:.6g}, device={str(self.members.device)!r})"
        )


Target = TwoLevelTarget | Tensor  # a tensor holds probabilities: (V,), or the logits' shape
