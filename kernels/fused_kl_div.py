"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Three operators stand below it, all on logits of shape (N, V):

    kernels::kl_div_forward    -> loss (N,), lse (N,), norm: what the backward needs besides lse
    kernels::kl_div_backward   -> dKL/dz times grad_loss, a new tensor (N, V)
    kernels::kl_div_backward_  the same, written over the logits (inplace_backward)

They are registered with torch.library, each with a fake kernel (shapes only), so torch.compile sees
one opaque call instead of breaking the graph, and losses run on the meta device. An operator takes
tensors and numbers only, so a target travels in parts (pack):

    kind         p              aux                  table                     alpha      beta
    two-level    mask (V,)      target token ids     bitmask                   alpha      beta
    dense        P
    teacher      t (N, V)       mask of the bias     bias, or the kernels'     strength

`impl` names the path: "triton", "triton-simple" or "torch".
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import torch_kl_div, torch_teacher
from .arguments import (
    mean_of,
    refuse_forward_mode,
    refuse_negative,
    resolve_impl,
    resolve_row_weights,
    resolve_target,
)
from .reference import compute_dtype
from .target import Target, TeacherTarget, TokenBias, TwoLevelTarget

Packed = tuple[str, Tensor, Tensor | None, Tensor | None, float, float]


def fused_kl_div(
    logits: Tensor,
    target: Target,
    reduction: str = "batchmean",
    inplace_backward: bool = False,
    impl: str | None = None,
    *,
    row_weights: Tensor | None = None,
) -> Tensor:
    """KL(P || softmax(logits)) in nats, where P is the target; log-softmax and KL in one pass.

    Args:
        logits: (..., V), float32, bfloat16, float16 or (not with Triton) float64. Read without a
            copy if the last dimension is contiguous and one stride spans the rows.
        target: a TwoLevelTarget, a TeacherTarget, or probabilities (V,) or (..., V). No gradient
            flows to it. Negative probabilities are refused on the CPU; on CUDA, where looking would
            wait for the device, they make NaN of the loss, and torch.autograd.detect_anomaly()
            finds them.
        reduction: "batchmean" (mean over all rows), "sum", or "none" (one value per row, (...)).
        inplace_backward: the backward writes the gradient over the logits, which saves a tensor of
            their size. They are lost then: a second backward, or one that needs them, raises.
        impl: "triton" (the default for CUDA tensors), "torch" (for all others), or "triton-simple"
            (the lesson, kernels/triton_simple.py; two-level targets only).
        row_weights: (...), a factor per row; 0 leaves a row out (padding), whatever is in it.
            "batchmean" divides by their sum. No gradient flows to them.

    Returns:
        The loss in float32 (float64 for float64 logits), first derivatives in reverse mode only.

    Raises:
        TypeError, ValueError: a bad argument: what was got, what was expected.
        RuntimeError: the path asked for cannot run here (nothing falls back silently), or a second
            or a forward-mode derivative is asked for.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits must be a floating-point tensor (..., V), got {got}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    refuse_forward_mode("fused_kl_div", logits)
    target = resolve_target(target, logits.shape, logits.device, reduction)
    if isinstance(target, TeacherTarget) and target.logits is None:
        raise ValueError(
            "got TeacherTarget.from_hidden(...), which is for fused_linear_kl_div; pass "
            "TeacherTarget(teacher_logits, bias)"
        )
    weights = resolve_row_weights(row_weights, logits.shape[:-1], logits.device)
    impl = resolve_impl(impl, logits.device, logits.dtype)
    rows = _as_rows(logits, inplace_backward)
    loss, *_ = _KlDiv.apply(
        rows, inplace_backward, impl, *pack(target, rows.shape[0], rows.dtype, impl)
    )
    if weights is not None:
        loss = torch.where(weights == 0, 0.0, loss * weights)
    if reduction == "none":
        return loss.view(logits.shape[:-1])
    # Not loss.mean(): the gradient of a sum is one number, which the backward reads as such.
    return mean_of(loss.sum(), reduction, loss.shape[0], weights)


def _as_rows(logits: Tensor, inplace: bool) -> Tensor:
    """(N, V) with a contiguous last dimension and rows that do not overlap; copied if need be."""
    vocab = logits.shape[-1]
    shape = logits.numel() // vocab, vocab
    if not inplace:
        rows = logits.reshape(shape)
        apart = rows.stride(1) == 1 and (shape[0] <= 1 or rows.stride(0) >= vocab)
        return rows if apart else rows.contiguous()
    if logits.stride(-1) == 1 and all(stride >= vocab for stride in logits.stride()[:-1]):
        try:
            return logits.view(shape)
        except RuntimeError:  # leading dimensions that no single stride spans
            pass
    raise ValueError(
        "inplace_backward=True needs logits with a contiguous last dimension and rows at one "
        f"stride, got shape {tuple(logits.shape)} with strides {logits.stride()}"
    )


def pack(target: Target, rows: int, dtype: torch.dtype, impl: str) -> Packed:
    """Take a target of logits (N, V) of this dtype apart, as the operators take it."""
    for_triton = impl != "torch"
    vec = 16 // dtype.itemsize
    if isinstance(target, TwoLevelTarget):
        table = target.bitmasks[vec] if for_triton else None
        return "two-level", target.mask, target.index, table, target.alpha, target.beta
    if isinstance(target, TeacherTarget):
        assert target.logits is not None
        t, bias = _as_rows(target.logits, False), target.bias
        if bias is None:
            return "teacher", t, None, None, 0.0, 0.0
        table = bias.tables[vec] if for_triton else bias.vector
        return "teacher", t, bias.mask, table, bias.strength, 0.0
    p = target if target.ndim == 1 else target.reshape(rows, target.shape[-1])
    return "dense", p, None, None, 0.0, 0.0


def unpack(
    dtype: torch.dtype,
    kind: str,
    p: Tensor,
    aux: Tensor | None,
    table: Tensor | None,
    alpha: float,
    beta: float,
) -> Target:
    """Put a target together again, with the one table that logits of this dtype need."""
    if kind == "dense":
        return p
    tables = {} if table is None else {16 // dtype.itemsize: table}
    if kind == "two-level":
        assert aux is not None
        return TwoLevelTarget.from_parts(p, aux, tables, alpha, beta)
    bias = None if table is None else TokenBias(table, aux, alpha, tables)
    return TeacherTarget.from_parts(p, bias)


def launchers(impl: str, device: torch.device, kind: str) -> ModuleType:
    """Import the module that has forward(logits, target) -> loss, lse, norm and
    backward(logits, lse, norm, target, grad_loss, out) for this kind of target."""
    if impl == "torch":
        return torch_teacher if kind == "teacher" else torch_kl_div
    name = "triton_launch"
    if impl == "triton-simple":
        if kind != "two-level":
            raise TypeError(
                f'impl="triton-simple" takes a TwoLevelTarget, got a {kind} one; pass impl="triton"'
            )
        name = "triton_simple"
    try:
        import triton  # here and not above: the package works without it

        module = import_module(f".{name}", __package__)
    except ImportError as error:
        raise RuntimeError(
            'impl="triton" needs Triton, which is not installed; install it or pass impl="torch"'
        ) from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f'impl="triton" needs CUDA tensors, got {device}; pass impl="torch", or set '
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
    return module


def new_norm(loss: Tensor, kind: str) -> Tensor:
    """Uninitialised norm of the rows of this loss: (N, 3) for a teacher, else (N,)."""
    return loss.new_empty((*loss.shape, 3) if kind == "teacher" else loss.shape)


@torch.library.custom_op("kernels::kl_div_forward", mutates_args=())
def kl_div_forward(
    logits: Tensor,
    kind: str,
    p: Tensor,
    aux: Tensor | None,
    table: Tensor | None,
    alpha: float,
    beta: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp per row, (N,) each; and norm, (N,), or (N, 3) for a teacher."""
    target = unpack(logits.dtype, kind, p, aux, table, alpha, beta)
    results = launchers(impl, logits.device, kind).forward(logits, target)
    refuse_negative(results[0], target)
    return results


@kl_div_forward.register_fake
def _(logits: Tensor, kind: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
    return loss, torch.empty_like(loss), new_norm(loss, kind)


@torch.library.custom_op("kernels::kl_div_backward", mutates_args=())
def kl_div_backward(
    logits: Tensor,
    lse: Tensor,
    norm: Tensor,
    grad_loss: Tensor,
    kind: str,
    p: Tensor,
    aux: Tensor | None,
    table: Tensor | None,
    alpha: float,
    beta: float,
    impl: str,
) -> Tensor:
    """The gradient of the logits as a new tensor (N, V), in their dtype."""
    out = torch_kl_div.empty_gradient(logits)
    target = unpack(logits.dtype, kind, p, aux, table, alpha, beta)
    launchers(impl, logits.device, kind).backward(logits, lse, norm, target, grad_loss, out)
    return out


@kl_div_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))


@torch.library.custom_op("kernels::kl_div_backward_", mutates_args=("logits",))
def kl_div_backward_(
    logits: Tensor,
    lse: Tensor,
    norm: Tensor,
    grad_loss: Tensor,
    kind: str,
    p: Tensor,
    aux: Tensor | None,
    table: Tensor | None,
    alpha: float,
    beta: float,
    impl: str,
) -> None:
    """The gradient of the logits, over the logits."""
    target = unpack(logits.dtype, kind, p, aux, table, alpha, beta)
    launchers(impl, logits.device, kind).backward(logits, lse, norm, target, grad_loss, logits)


class _KlDiv(torch.autograd.Function):
    """loss, lse, norm of logits (N, V); the derivative of loss alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, _: bool, impl: str, *packed: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kl_div_forward(logits, *packed, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, ctx.inplace, ctx.impl, ctx.kind, p, aux, table, *ctx.numbers = inputs
        ctx.save_for_backward(logits, *output[1:], p, aux, table)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, norm, *tensors = ctx.saved_tensors
        arguments = lse, norm, grad_loss, ctx.kind, *tensors, *ctx.numbers, ctx.impl
        if torch.is_grad_enabled():  # create_graph=True, or torch.func.grad
            if ctx.inplace:  # the graph would keep logits that are overwritten here
                refuse_second_derivative("fused_kl_div")
            grad = FirstDerivative.apply("fused_kl_div", kl_div_backward, logits, *arguments)
        elif ctx.inplace:
            grad = logits.detach()
            kl_div_backward_(grad, *arguments)
        else:
            grad = kl_div_backward(logits, *arguments)
        return grad, *(None,) * 8


class FirstDerivative(torch.autograd.Function):
    """The results of an operator that computes a first derivative; their own is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second_derivative(ctx.name)


def refuse_second_derivative(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} has first derivatives only, got a request for a second one (create_graph=True); "
        "use kernels.reference.kl_div, which has all"
    )
