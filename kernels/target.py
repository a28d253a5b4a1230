"""Targets: the distribution over the vocabulary that the model is pulled toward.

    V     vocabulary size
    S     the target tokens, |S| of them
    P     target probabilities

    TwoLevelTarget   alpha on S, beta elsewhere, |S| alpha + (V - |S|) beta = 1
    TeacherTarget    softmax(t), where t are a teacher's logits; with a tilt, G is added to t on S

A two-level target is a mask and two numbers, so no N x V matrix of probabilities is ever built: the
Triton kernels read one bit per token from a table that all rows share (bitmask.py). It is built
with the target, because under CUDA graphs memory that an operator allocates during capture belongs
to the graph. Numbers are tensors, because torch.compile compiles again for each Python number.
"""

import copy
import math
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitmask import pack_bits

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TwoLevel(NamedTuple):
    """A TwoLevelTarget as the operators take it."""

    mask: Tensor  # bool (V,)
    bitmasks: Tensor  # int32 (12, tiles, THREADS): a table of 4 rows for vec = 4, of 8 for vec = 8
    ids: Tensor  # int64 (|S|,)
    levels: Tensor  # (6,): alpha, beta, beta / alpha, log alpha, log beta, sum P log P
    beta: Tensor | None  # (); None if it is 0


class Teacher(NamedTuple):
    """A TeacherTarget as the operators take it."""

    logits: Tensor  # t, (N, V); or the teacher's hidden states, (N, C)
    weight: Tensor | None  # (V, C) of the teacher's LM head, for hidden states
    mask: Tensor | None = None  # of the tilt's S, as in TwoLevel
    bitmasks: Tensor | None = None
    strength: Tensor | None = None  # G, ()


Parts = TwoLevel | Teacher


class TwoLevelTarget:
    """Probability alpha on each target token and beta on every other token.

    Args:
        mask: bool (V,), on any device that holds data; True on the target tokens, which are some
            and not all. It is copied.
        alpha, beta: relative weights, finite, alpha > beta >= 0; scaled so that P sums to 1.

    Attributes:
        mask, alpha, beta: the copy, and the two probabilities.
        index, size, vocab_size: the ids of S, int64 (|S|,); |S|; V.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    kind = "two_level"

    def __init__(self, mask: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
            raise TypeError(
                f"mask must be a bool tensor (V,), got {described(mask)}; use mask.bool(), or for "
                "ids torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(ids), True)"
            )
        if not math.inf > alpha > beta >= 0:
            raise ValueError(f"weights must be finite, alpha > beta >= 0, got {alpha=}, {beta=}")
        size, vocab = int(mask.sum()), mask.numel()
        if not 0 < size < vocab:
            raise ValueError(f"mask must select some tokens and not all, got {size} of {vocab}")
        ratio = beta / alpha  # before any sum of weights, which could overflow
        total = size + (vocab - size) * ratio
        self.alpha, self.beta, self.size, self.vocab_size = 1 / total, ratio / total, size, vocab
        logs = math.log(self.alpha), math.log(self.beta) if self.beta else 0.0  # 0 log 0 = 0
        sum_p_log_p = size * self.alpha * logs[0] + (vocab - size) * self.beta * logs[1]
        levels = self.alpha, self.beta, ratio, *logs, sum_p_log_p
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward
            self._hold(
                mask.clone(),
                torch.cat([pack_bits(mask, vec) for vec in (4, 8)]),
                mask.nonzero().squeeze(1),
                torch.tensor(levels, dtype=_widest(mask.device), device=mask.device),
            )

    def _hold(self, mask: Tensor, bitmasks: Tensor, ids: Tensor, levels: Tensor) -> None:
        self.mask, self.index, self._on = mask, ids, {mask.device: self}
        self.parts = TwoLevel(mask, bitmasks, ids, levels, levels[1].clone() if self.beta else None)

    def to(self, device: torch.device | str) -> "TwoLevelTarget":
        """Return the target on another device. It is kept there, so only the first call copies."""
        device = torch.empty(0, device=device).device  # with its index
        if device not in self._on:
            self._on[device], tokens = copy.copy(self), self.parts[:3]
            with torch.inference_mode(False):
                mask, bitmasks, ids = (x.to(device) for x in tokens)
                levels = self.parts.levels.to(device, _widest(device))
                self._on[device]._hold(mask, bitmasks, ids, levels)
        return self._on[device]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P as a tensor (V,) on the device of the mask."""
        p = torch.full((self.vocab_size,), self.beta, dtype=dtype, device=self.mask.device)
        return p.masked_fill_(self.mask, self.alpha)

    def __repr__(self) -> str:
        return f"TwoLevelTarget({self.size} of {self.vocab_size} tokens on {self.mask.device})"


Tilt = tuple[TwoLevelTarget, float | Tensor]  # the tokens S, and G in nats


class TeacherTarget:
    """P = softmax(t): the distribution of a teacher, row by row; with a tilt, softmax(t + G on S).

    Without a tilt this is distillation. With one, a probability m of the tokens of S becomes
    m e^G / (1 - m + m e^G): the distribution that maximises G times that probability minus the KL
    divergence to the teacher. Add any other bias per token to t.

    Args:
        logits: t, of the shape (..., V) of the student's logits, on their device, of any floating
            dtype. No gradient flows to a teacher or its tilt.
        tilt: (target, G): a TwoLevelTarget, whose alpha and beta are not used, and the nats to
            add to the logits of S: a number below +inf (-inf forbids the tokens) or a tensor (),
            which torch.compile does not compile again for each value.

    Attributes:
        parts: t, or hidden states and weight, and the tilt's tensors; without a gradient.
        shape, device, tilt: of t; the latter as given.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    kind = "teacher"

    def __init__(
        self, logits: Tensor, tilt: Tilt | None = None, *, _weight: Tensor | None = None
    ) -> None:
        check_floating("the teacher's logits or hidden", logits)
        vocab = logits.shape[-1] if _weight is None else _weight.shape[0]
        self.shape, self.device = torch.Size((*logits.shape[:-1], vocab)), logits.device
        self.tilt, tokens = tilt, () if tilt is None else _tilt_parts(tilt, vocab, logits.device)
        weight = None if _weight is None else _constant(_weight)
        self.parts = Teacher(as_rows(_constant(logits)), weight, *tokens)

    @classmethod
    def from_hidden(cls, hidden: Tensor, weight: Tensor, tilt: Tilt | None = None) -> Self:
        """Build a target for fused_linear_kl_div: t = F.linear(hidden, weight), chunk by chunk.

        hidden: (..., C) of the teacher's LM head, with the student's leading dimensions and a C of
        its own. weight: (V, C), with LoRA and bias merged as fused_linear_kl_div explains.
        """
        check_floating("the teacher's weight", weight)
        return cls(hidden, tilt, _weight=weight)

    def whole_logits(self, dtype: torch.dtype) -> Tensor:
        """t, tilted, of all rows, (..., V), in this dtype: for the definition, which keeps them."""
        rows, weight, mask, _, strength = self.parts
        t = (rows if weight is None else F.linear(rows, weight)).to(dtype).view(self.shape)
        return t if mask is None or strength is None else torch.where(mask, t + strength, t)

    def __repr__(self) -> str:
        return f"TeacherTarget({tuple(self.shape)} on {self.device}, tilt={self.tilt})"


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with rows that are contiguous and apart, or one; copied if need be."""
    rows = x.reshape(-1, x.shape[-1])
    shared_or_apart = rows.shape[0] <= 1 or rows.stride(0) == 0 or rows.stride(0) >= rows.shape[1]
    return rows if rows.stride(1) == 1 and shared_or_apart else rows.contiguous()


def described(x: object) -> str:
    """What an error says that it got."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    grad = ", which requires grad" if x.requires_grad else ""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}{grad}"


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless x is a floating-point tensor of one or more dimensions."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.ndim == 0:
        raise TypeError(f"{name} must be a floating-point tensor (..., V), got {described(x)}")


def _tilt_parts(tilt: Tilt, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A tilt of logits (..., V) on this device as Teacher has it; TypeError, ValueError if none."""
    target, g = tilt if isinstance(tilt, tuple) and len(tilt) == 2 else (None, None)
    if not isinstance(target, TwoLevelTarget) or not isinstance(g, float | int | Tensor):
        raise TypeError(f"tilt must be (TwoLevelTarget, G), G in nats, got {tilt!r}")
    if target.vocab_size != vocab:
        raise ValueError(f"the tilt must be of {vocab} tokens, got {target}")
    if g.ndim if isinstance(g, Tensor) else not g < math.inf:
        raise ValueError(f"G must be below +inf and not NaN, or a tensor (), got {g}")
    where: Any = {"dtype": _widest(device), "device": device}
    g = g.to(**where) if isinstance(g, Tensor) else torch.full((), g, **where)
    return *target.to(device).parts[:2], _constant(g)


def _constant(x: Tensor) -> Tensor:
    """Detach x; copy an inference tensor, which autograd could not save."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x.detach()
    with torch.inference_mode(False):
        return x.clone()


def _widest(device: torch.device | str) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


Target = TwoLevelTarget | TeacherTarget | Tensor  # a tensor: P, (V,) or the logits' shape
