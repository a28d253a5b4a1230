"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Three operators stand below it, all on logits of shape (N, V):

    kernels::kl_div_forward    -> loss (N,), lse (N,), norm: what the backward needs besides lse
    kernels::kl_div_backward   -> dKL/dz times grad_loss, a new tensor (N, V)
    kernels::kl_div_backward_  the same, written over the logits (inplace_backward)

They are registered with torch.library, each with a fake kernel (shapes only), so torch.compile sees
one opaque call instead of breaking the graph, and losses run on the meta device. An operator takes
tensors and numbers only, so a target travels in parts (pack, unpack), and the path with it:

    kind         p              aux                  table                     alpha      beta
    two-level    mask (V,)      target token ids     bitmask                   alpha      beta
    dense        P
    teacher      t (N, V)       mask of the bias     bias, or the kernels'     strength
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import arguments, torch_kl_div, torch_teacher
from .reference import compute_dtype
from .target import Target, TeacherTarget, TokenBias, TwoLevelTarget, check_floating

PACKED = "str kind, Tensor p, Tensor? aux, Tensor? table, float alpha, float beta, str impl"


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
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    arguments.refuse_forward_mode("fused_kl_div", logits)
    target = arguments.resolve_target(target, logits.shape, logits.device, reduction)
    if isinstance(target, TeacherTarget) and target.logits is None:
        raise ValueError(
            "got TeacherTarget.from_hidden(...), which is for fused_linear_kl_div; pass "
            "TeacherTarget(teacher_logits, bias)"
        )
    weights = arguments.resolve_row_weights(row_weights, logits.shape[:-1], logits.device)
    impl = arguments.resolve_impl(impl, logits.device, logits.dtype)
    rows = _as_rows(logits, inplace_backward)
    loss, *_ = _KlDiv.apply(rows, inplace_backward, *pack(target, rows.dtype, impl))
    loss = weighted(loss, weights)
    if reduction == "none":
        return loss.view(logits.shape[:-1])
    # Not loss.mean(): the gradient of a sum is one number, which the backward reads as such.
    return mean_of(loss.sum(), reduction, loss.shape[0], weights)


def weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of each row times its weight; 0 where that is 0, whatever the loss is."""
    return loss if weights is None else torch.where(weights == 0, 0.0, loss * weights)


def mean_of(total: Tensor, reduction: str, rows: int, weights: Tensor | None) -> Tensor:
    """Divide the summed loss by what "batchmean" divides by: the rows, or the sum of weights."""
    if reduction == "sum":
        return total
    return total / (rows if weights is None else weights.sum(dtype=total.dtype))


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


def pack(target: Target, dtype: torch.dtype, impl: str) -> tuple[Any, ...]:
    """Take a target of logits (N, V) of this dtype apart, as the operators take it: PACKED."""
    for_triton = impl != "torch"
    vec = 16 // dtype.itemsize
    if isinstance(target, TwoLevelTarget):
        table = target.bitmasks[vec] if for_triton else None
        return "two-level", target.mask, target.index, table, target.alpha, target.beta, impl
    if isinstance(target, TeacherTarget):
        t, bias = target.hidden if target.logits is None else target.logits, target.bias
        t = _as_rows(t, False)
        if bias is None:
            return "teacher", t, None, None, 0.0, 0.0, impl
        table = bias.tables[vec] if for_triton else bias.vector
        return "teacher", t, bias.mask, table, bias.strength, 0.0, impl
    p = target if target.ndim == 1 else target.flatten(0, -2)
    return "dense", p, None, None, 0.0, 0.0, impl


def unpack(
    logits: Tensor, kind: str, p: Tensor, aux: Any, table: Any, alpha: float, beta: float, impl: str
) -> tuple[ModuleType, Target]:
    """The launchers, and the target put together again with the one table that the logits need."""
    tables = {16 // logits.dtype.itemsize: table}
    target: Target = p
    if kind == "two-level":
        target = TwoLevelTarget.from_parts(p, aux, tables, alpha, beta)
    elif kind == "teacher":
        bias = None if table is None else TokenBias(table, aux, alpha, tables)
        target = TeacherTarget.from_parts(p, bias)
    return launchers(impl, logits.device, kind), target


def launchers(impl: str, device: torch.device, kind: str) -> ModuleType:
    """Import the module that has forward(logits, target) -> loss, lse, norm and
    backward(logits, lse, norm, target, grad_loss, out) for this kind of target. Logits are (N, V)
    with a contiguous last dimension, out may be the logits, and the target is on their device."""
    if impl == "torch":
        return torch_teacher if kind == "teacher" else torch_kl_div
    if impl == "triton-simple" and kind != "two-level":
        raise TypeError(
            f'impl="triton-simple" takes a TwoLevelTarget, got a {kind} one; pass impl="triton"'
        )
    name = "triton_simple" if impl == "triton-simple" else "triton_launch"
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


def empty_results(rows: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss, lse and norm of logits of this dtype: (N,) each, or (N, 3) for a
    teacher's norm."""
    n = rows.shape[0]
    loss = rows.new_empty(n, dtype=compute_dtype(dtype))
    return loss, torch.empty_like(loss), loss.new_empty((n, 3) if kind == "teacher" else n)


@torch.library.custom_op(
    "kernels::kl_div_forward",
    mutates_args=(),
    schema=f"(Tensor logits, {PACKED}) -> (Tensor, Tensor, Tensor)",
)
def kl_div_forward(logits: Tensor, *packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp per row, (N,) each; and norm, (N,), or (N, 3) for a teacher."""
    kernels, target = unpack(logits, *packed)
    results = kernels.forward(logits, target)
    arguments.refuse_negative(results[0], target)
    return results


@kl_div_forward.register_fake
def _(logits: Tensor, kind: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(logits, logits.dtype, kind)


@torch.library.custom_op(
    "kernels::kl_div_backward",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor lse, Tensor norm, Tensor grad_loss, {PACKED}) -> Tensor",
)
def kl_div_backward(
    logits: Tensor, lse: Tensor, norm: Tensor, grad_loss: Tensor, *packed: Any
) -> Tensor:
    """The gradient of the logits as a new tensor (N, V), in their dtype."""
    kernels, target = unpack(logits, *packed)
    out = torch_kl_div.empty_gradient(logits)
    kernels.backward(logits, lse, norm, target, grad_loss, out)
    return out


@kl_div_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))


@torch.library.custom_op(
    "kernels::kl_div_backward_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor lse, Tensor norm, Tensor grad_loss, {PACKED}) -> ()",
)
def kl_div_backward_(
    logits: Tensor, lse: Tensor, norm: Tensor, grad_loss: Tensor, *packed: Any
) -> None:
    """The gradient of the logits, over the logits."""
    kernels, target = unpack(logits, *packed)
    kernels.backward(logits, lse, norm, target, grad_loss, logits)


class _KlDiv(torch.autograd.Function):
    """loss, lse, norm of logits (N, V); the derivative of loss alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, inplace: bool, *packed: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kl_div_forward(logits, *packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, ctx.inplace, ctx.kind, p, aux, table, *ctx.options = inputs
        ctx.save_for_backward(logits, *output[1:], p, aux, table)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, norm, *tensors = ctx.saved_tensors
        others = lse, norm, grad_loss, ctx.kind, *tensors, *ctx.options
        if not ctx.inplace:
            grad = first_derivative("fused_kl_div", kl_div_backward, logits, *others)
        elif torch.is_grad_enabled():  # the graph would keep logits that are overwritten here
            refuse_second_derivative("fused_kl_div")
        else:
            grad = logits.detach()
            kl_div_backward_(grad, *others)
        return grad, *(None,) * 8


def first_derivative(name: str, operator: Any, *inputs: Any) -> Any:
    """The results of an operator that computes a derivative; theirs is refused, not 0."""
    if torch.is_grad_enabled():  # create_graph=True, or torch.func.grad
        return _FirstDerivative.apply(name, operator, *inputs)
    return operator(*inputs)


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, operator: Any, *inputs: Any) -> Any:
        return operator(*inputs)

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
