"""Targets: the distribution over the vocabulary that the model is pulled toward.

    V     vocabulary size
    S     the target tokens, |S| of them
    P     target probabilities

    TwoLevelTarget   alpha on S, beta elsewhere, |S| alpha + (V - |S|) beta = 1
    TeacherTarget    softmax(t + b): t the logits of a teacher, b a bias per token
    a tensor         P itself, (V,) for all rows of the logits, or one row for each of theirs

A two-level target is a mask and two numbers, so no N x V matrix of probabilities is ever built: the
Triton kernels read one bit per token, from a table that all rows share (bitmask.py). A teacher's
bias that has one value besides 0 is a mask and a number too. The tables are made with the target,
never inside an operator: a CUDA graph that captured a loss would own what it allocates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .bitmask import pack_bits, shifted_copies

VECS = (4, 8)  # elements in 16 bytes of logits: float32, and bfloat16 or float16


class TwoLevelTarget:
    """Probability alpha on each target token and beta on every other token.

    Args:
        mask: bool (V,), on any device that holds data; True on the target tokens, which are some
            and not all. It is copied.
        alpha, beta: relative weights, finite, alpha > beta >= 0; scaled so that P sums to 1.

    Attributes:
        mask, alpha, beta: the copy, and the two probabilities.
        index: int64 (|S|,), the ids of the target tokens, ascending.
        bitmasks: the tables of bitmask.py, by the elements in 16 bytes of logits.

    Raises:
        TypeError, ValueError: an argument is not as above.
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
            bitmasks = {vec: pack_bits(mask, vec) for vec in VECS}
        size, vocab = index.numel(), mask.numel()
        if not 0 < size < vocab:
            raise ValueError(
                f"mask must select some tokens and not all, got {size} of {vocab}; "
                "check the rule that chose them"
            )
        ratio = beta / alpha  # before any sum of weights, which could overflow
        total = size + (vocab - size) * ratio
        self.alpha, self.beta = 1 / total, ratio / total
        self.mask, self.index, self.bitmasks = mask, index, bitmasks
        self._on_device: dict[torch.device, TwoLevelTarget] = {}

    @classmethod
    def from_parts(
        cls, mask: Tensor, index: Tensor, bitmasks: dict[int, Tensor], alpha: float, beta: float
    ) -> "TwoLevelTarget":
        """Build from these attributes, unchecked: no copy, no host synchronisation."""
        target = cls.__new__(cls)
        target.alpha, target.beta = alpha, beta
        target.mask, target.index, target.bitmasks = mask, index, bitmasks
        target._on_device = {}
        return target

    @property
    def size(self) -> int:
        """|S|, the number of target tokens."""
        return self.index.numel()

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.mask.numel()

    @property
    def sum_p_log_p(self) -> float:
        """The sum over the vocabulary of P log P in nats, with 0 log 0 = 0."""
        levels = (self.size, self.alpha), (self.vocab_size - self.size, self.beta)
        return sum(count * p * math.log(p) for count, p in levels if p > 0)

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
                mask, index = self.mask.to(device), self.index.to(device)
                bitmasks = {vec: table.to(device) for vec, table in self.bitmasks.items()}
            there = TwoLevelTarget.from_parts(mask, index, bitmasks, self.alpha, self.beta)
            self._on_device[device] = there
        return self._on_device[device]

    def __repr__(self) -> str:
        return (
            f"TwoLevelTarget({self.size} of {self.vocab_size} tokens, alpha={self.alpha:.6g}, "
            f"beta={self.beta:.6g}, device={str(self.mask.device)!r})"
        )


@dataclass(frozen=True, eq=False)
class TokenBias:
    """A teacher's bias b, (V,), as the losses read it; the tables are for the Triton kernels."""

    vector: Tensor  # b
    mask: Tensor | None  # where b is not 0, if it has one value there
    strength: float  # that value, or 0
    # By the elements in 16 bytes of logits: bitmasks if there is a mask, else float32 copies of b,
    # one per alignment.
    tables: dict[int, Tensor]


class TeacherTarget:
    """P = softmax(t + b): the distribution of a teacher per row, with a bias per token.

    Without a bias this is distillation. With b = G on some tokens and 0 elsewhere it is the teacher
    tilted toward them: the distribution that maximises G times the probability of those tokens
    minus the KL divergence to the teacher. b = -inf forbids a token.

    Args:
        logits: t, of the shape (..., V) of the student's logits, on their device; any floating
            dtype (with Triton no float64). Not copied, unless it is an inference tensor.
        bias: b (V,), any floating dtype, on the same device.

    Examining a bias waits for the device, so the result is kept as long as the tensor lives: pass
    the same one each time, and a new target per step costs nothing. A target with a bias cannot be
    built inside a compiled function, only used there.

    Attributes:
        logits: t; None after from_hidden.
        hidden, weight: as given to from_hidden, else None.
        shape, device: those of t.
        bias: TokenBias, a copy of b; None if b is None or 0 everywhere.

    Raises:
        TypeError, ValueError: an argument is not as above, or requires grad (no gradient flows to a
            teacher); b has NaN or +inf, or is -inf everywhere.
    """

    logits: Tensor | None = None
    hidden: Any = None  # not Tensor | None: where logits is None, these are tensors
    weight: Any = None

    def __init__(self, logits: Tensor, bias: Tensor | None = None) -> None:
        self.logits = _constant("the teacher's logits", logits)
        self.shape, self.device = logits.shape, logits.device
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"the teacher's logits must be (..., V), got {tuple(logits.shape)}")
        self.bias = _token_bias(bias, logits.shape[-1], logits.device)

    @classmethod
    def from_hidden(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> "TeacherTarget":
        """Build a target for fused_linear_kl_div: t = F.linear(hidden, weight), chunk by chunk.

        Args:
            hidden: (..., C), input of the teacher's LM head, with the leading dimensions of the
                student's; C may differ from the student's.
            weight: (V, C), of hidden's dtype, or any under autocast.
            bias: b (V,), as above.
        """
        target = cls.__new__(cls)
        check_head(hidden, weight, "the teacher's ")
        target.hidden = _constant("the teacher's hidden", hidden)
        target.weight = _constant("the teacher's weight", weight)
        target.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        target.device = hidden.device
        target.bias = _token_bias(bias, weight.shape[0], weight.device)
        return target

    @classmethod
    def from_parts(cls, logits: Tensor, bias: TokenBias | None) -> "TeacherTarget":
        """Build from these attributes, unchecked: no copy, no host synchronisation."""
        target = cls.__new__(cls)
        target.logits, target.bias = logits, bias
        target.shape, target.device = logits.shape, logits.device
        return target

    def whole_logits(self, dtype: torch.dtype) -> Tensor:
        """t + b of all rows, (..., V), in this dtype: for the definition, which keeps them."""
        t = F.linear(self.hidden, self.weight) if self.logits is None else self.logits
        return t.to(dtype) if self.bias is None else t.to(dtype) + self.bias.vector.to(dtype)


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


def _constant(name: str, x: Tensor) -> Tensor:
    """Check that x is floating-point and asks for no gradient; copy an inference tensor, which
    autograd could not save."""
    check_floating(name, x)
    if x.requires_grad:
        raise ValueError(
            f"{name} must not require grad, for no gradient flows to a teacher; "
            "compute it under torch.no_grad() or pass .detach()"
        )
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


_BIASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # b -> its version, TokenBias


def _token_bias(bias: Tensor | None, vocab: int, device: torch.device) -> TokenBias | None:
    """Check and examine a bias, once per tensor and version of it."""
    if bias is None:
        return None
    constant = _constant("bias", bias)
    if bias.shape != (vocab,) or bias.device != device:
        raise ValueError(
            f"bias must have shape ({vocab},) on {device}, got {tuple(bias.shape)} on {bias.device}"
        )
    with torch.inference_mode(False):
        if bias.is_inference():  # counts no versions, so a change in place would go unnoticed
            return _examine(constant)
        if bias not in _BIASES or _BIASES[bias][0] != bias._version:
            _BIASES[bias] = bias._version, _examine(constant.clone())
    return _BIASES[bias][1]


def _examine(bias: Tensor) -> TokenBias | None:
    """Find the two values of a bias, if one of them is 0, and build its tables; None if all 0."""
    top = bias.max().item()  # NaN if any is
    if not math.isfinite(top):
        raise ValueError(
            f"bias must be below +inf, not NaN, and above -inf for some token; its maximum is {top}"
        )
    values = bias.unique()
    others = values[values != 0]
    if len(others) == 0:
        return None
    if len(values) == 2 and len(others) == 1:
        mask = bias != 0
        tables = {vec: pack_bits(mask, vec) for vec in VECS}
        return TokenBias(bias, mask, others.item(), tables)
    length = (len(bias) + 7) // 8 * 8
    tables = {vec: shifted_copies(bias.float(), vec, length) for vec in VECS}
    return TokenBias(bias, None, 0.0, tables)


Probabilities = TwoLevelTarget | Tensor  # a tensor holds P: (V,), or the logits' shape
Target = Probabilities | TeacherTarget
