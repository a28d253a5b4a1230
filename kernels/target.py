"""Targets: the distribution over the vocabulary that the model is pulled toward.

    V     vocabulary size
    S     the target tokens, |S| of them
    P     target probabilities

    TwoLevelTarget   alpha on S, beta elsewhere, |S| alpha + (V - |S|) beta = 1
    TeacherTarget    softmax(t), where t are a teacher's logits; with a tilt, G is added to t on S

A two-level target is a mask and two numbers, so no N x V matrix of probabilities is ever built: the
Triton kernels read one bit per token from a table that all rows share (bitmask.py). Tables are
built with the target, not inside an operator: under CUDA graphs, memory that is allocated during
capture belongs to the graph. Numbers are tensors, because torch.compile compiles again for each
value of a Python number that an operator takes.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitmask import pack_bits

VECS = (4, 8)  # elements in 16 bytes of logits: float32, and bfloat16 or float16


class TwoLevel(NamedTuple):
    """A TwoLevelTarget as the operators take it."""

    mask: Tensor  # bool (V,)
    ids: Tensor  # int64 (|S|,)
    bitmasks: Tensor  # int32 (12, tiles, THREADS): a table of 4 rows for vec = 4, of 8 for vec = 8
    levels: Tensor  # (6,): alpha, beta, beta / alpha, log alpha, log beta, sum P log P
    has_beta: bool  # beta > 0


class Teacher(NamedTuple):
    """A TeacherTarget as the operators take it."""

    logits: Tensor  # t, (N, V); or the teacher's hidden states, (N, C)
    weight: Tensor | None  # (V, C) of the teacher's LM head, for hidden states
    mask: Tensor | None  # these three: of the tilt's S, as in TwoLevel
    ids: Tensor | None
    bitmasks: Tensor | None
    strength: Tensor | None  # G, ()


class TwoLevelTarget:
    """Probability alpha on each target token and beta on every other token.

    Args:
        mask: bool (V,), on any device that holds data; True on the target tokens, which are some
            and not all. It is copied.
        alpha, beta: relative weights, finite, alpha > beta >= 0; scaled so that P sums to 1.

    Attributes:
        mask, alpha, beta: the copy, and the two probabilities.
        index, bitmasks, levels: the ids of S, and what else TwoLevel has.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    kind = "two_level"

    def __init__(self, mask: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(
                f"mask must be a bool tensor (V,), got {got}; use mask.bool() for zeros and ones, "
                "torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(ids), True) for ids"
            )
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
        size, vocab = int(mask.sum()), mask.numel()
        if not 0 < size < vocab:
            raise ValueError(
                f"mask must select some tokens and not all, got {size} of {vocab}; "
                "check the rule that chose them"
            )
        ratio = beta / alpha  # before any sum of weights, which could overflow
        total = size + (vocab - size) * ratio
        self.alpha, self.beta = 1 / total, ratio / total
        self._has_beta = self.beta > 0  # read instead of beta: torch.compile guards what it reads
        logs = math.log(self.alpha), math.log(self.beta) if self.beta else 0.0  # 0 log 0 = 0
        sum_p_log_p = size * self.alpha * logs[0] + (vocab - size) * self.beta * logs[1]
        levels = self.alpha, self.beta, ratio, *logs, sum_p_log_p
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward
            self.mask = mask.clone()
            self.index = self.mask.nonzero().squeeze(1)
            self.bitmasks = torch.cat([pack_bits(self.mask, vec) for vec in VECS])
            self.levels = torch.tensor(levels, dtype=_widest(mask.device), device=mask.device)
        self._on_device: dict[torch.device, TwoLevelTarget] = {}

    @property
    def parts(self) -> TwoLevel:
        """What the operators take."""
        return TwoLevel(self.mask, self.index, self.bitmasks, self.levels, self._has_beta)

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
        if device.type == "cuda" and device.index is None:  # or set_device would make it stale
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.mask.device:
            return self
        if device not in self._on_device:
            there = TwoLevelTarget.__new__(TwoLevelTarget)
            there.alpha, there.beta, there._has_beta = self.alpha, self.beta, self._has_beta
            there._on_device = {}
            tokens = self.mask, self.index, self.bitmasks
            with torch.inference_mode(False):
                there.mask, there.index, there.bitmasks = (x.to(device) for x in tokens)
                there.levels = self.levels.to(device, _widest(device))
            self._on_device[device] = there
        return self._on_device[device]

    def __repr__(self) -> str:
        return (
            f"TwoLevelTarget({self.size} of {self.vocab_size} tokens, alpha={self.alpha:.6g}, "
            f"beta={self.beta:.6g}, device={str(self.mask.device)!r})"
        )


Tilt = tuple[TwoLevelTarget, float | Tensor]  # the tokens S, and G in nats


class TeacherTarget:
    """P = softmax(t): the distribution of a teacher, row by row; with a tilt, softmax(t + G on S).

    Without a tilt this is distillation. With one, a probability m of the tokens of S becomes
    m e^G / (1 - m + m e^G): the distribution that maximises G times that probability minus the KL
    divergence to the teacher. Add any other bias per token to t.

    Args:
        logits: t, of the shape (..., V) of the student's logits, on their device, of any floating
            dtype. No gradient flows to a teacher or its tilt.
        tilt: (target, G): a TwoLevelTarget, of which only the tokens S are used, and the nats to
            add to their logits: a number below +inf (-inf forbids the tokens) or a tensor () on
            the device of t. A target that is built inside a compiled function is compiled again
            for each number: pass a G that changes as a tensor.

    Attributes:
        logits, tilt, shape, device: of t; logits is None after from_hidden.
        hidden, weight: as given to from_hidden, else None.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    kind = "teacher"
    logits: Tensor | None = None
    hidden: Any = None  # not Tensor | None: where logits is None, these are tensors
    weight: Any = None

    def __init__(self, logits: Tensor, tilt: Tilt | None = None) -> None:
        check_floating("the teacher's logits", logits)
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"the teacher's logits must be (..., V), got {tuple(logits.shape)}")
        self.logits = _constant(logits)
        self._complete(self.logits, logits.shape[-1], tilt)

    @classmethod
    def from_hidden(
        cls, hidden: Tensor, weight: Tensor, tilt: Tilt | None = None
    ) -> "TeacherTarget":
        """Build a target for fused_linear_kl_div: t = F.linear(hidden, weight), chunk by chunk.

        Args:
            hidden: (..., C), input of the teacher's LM head, with the leading dimensions of the
                student's; C may differ from the student's.
            weight: (V, C), with LoRA and bias merged, as fused_linear_kl_div explains.
            tilt: as above.
        """
        check_head(hidden, weight, "the teacher's ")
        target = cls.__new__(cls)
        target.hidden, target.weight = _constant(hidden), _constant(weight)
        target._complete(target.hidden, weight.shape[0], tilt)
        return target

    def _complete(self, rows: Tensor, vocab: int, tilt: Tilt | None) -> None:
        """Set what both kinds have; rows: the logits or the hidden states."""
        self.shape, self.device = torch.Size((*rows.shape[:-1], vocab)), rows.device
        self.tilt = tilt
        tokens: tuple[Tensor | None, ...] = None, None, None, None
        if tilt is not None:
            target, strength = _check_tilt(tilt, vocab)
            target, dtype = target.to(self.device), _widest(self.device)
            if isinstance(strength, Tensor):
                strength = strength.detach()
                number = strength.to(dtype)
            else:
                number = torch.full((), strength, dtype=dtype, device=self.device)
            self.tilt, tokens = (target, strength), (*target.parts[:3], _constant(number))
        self.parts = Teacher(as_rows(rows), self.weight, *tokens)

    def whole_logits(self, dtype: torch.dtype) -> Tensor:
        """t, tilted, of all rows, (..., V), in this dtype: for the definition, which keeps them."""
        t = F.linear(self.hidden, self.weight) if self.logits is None else self.logits
        if self.tilt is None:
            return t.to(dtype)
        return torch.where(self.tilt[0].mask, t.to(dtype) + self.tilt[1], t.to(dtype))

    def __repr__(self) -> str:
        tilt = "" if self.tilt is None else f", tilt={self.tilt}"
        return f"TeacherTarget({tuple(self.shape)}{tilt}, device={str(self.device)!r})"


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with a contiguous last dimension and one stride, which may be 0; copied
    only if need be."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    shared_or_apart = rows.shape[0] <= 1 or rows.stride(0) == 0 or rows.stride(0) >= rows.shape[1]
    return rows if rows.stride(1) == 1 and shared_or_apart else rows.contiguous()


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def check_head(hidden: Tensor, weight: Tensor, whose: str = "") -> None:
    """TypeError or ValueError unless F.linear takes these hidden states and this weight."""
    check_floating(f"{whose}hidden", hidden)
    check_floating(f"{whose}weight", weight)
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{whose}hidden must be (..., C) and weight (V, C), as F.linear takes them; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"{whose}hidden is on {hidden.device}, weight on {weight.device}")


def _check_tilt(tilt: Tilt, vocab: int) -> Tilt:
    """TypeError or ValueError unless the tilt is one of logits (..., V)."""
    target, strength = tilt if isinstance(tilt, tuple) and len(tilt) == 2 else (None, None)
    if not isinstance(target, TwoLevelTarget) or not isinstance(strength, float | int | Tensor):
        raise TypeError(f"tilt must be (TwoLevelTarget, G), G in nats, got {tilt!r}")
    if target.vocab_size != vocab:
        raise ValueError(f"a tilt of {target.vocab_size} tokens is not for logits of {vocab}")
    if isinstance(strength, Tensor):
        if strength.ndim:
            raise ValueError(f"G must be a number or a tensor (), got {tuple(strength.shape)}")
    elif not torch.compiler.is_compiling() and not strength < math.inf:
        raise ValueError(f"G must be below +inf and not NaN, got {strength}")
    return target, strength


def _constant(x: Tensor) -> Tensor:
    """Detach x; copy an inference tensor, which autograd could not save."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x.detach()
    with torch.inference_mode(False):
        return x.clone()


def _widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


Target = TwoLevelTarget | TeacherTarget | Tensor  # a tensor: P, (V,) or the logits' shape
