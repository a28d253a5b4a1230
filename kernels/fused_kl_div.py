"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Each kind of target has three operators, on logits of shape (N, V):

    kl_div_two_level_forward     kl_div_teacher_forward     -> loss (N,), lse (N,), and norm
    kl_div_two_level_backward    kl_div_teacher_backward    -> dKL/dz times grad_loss, new, (N, V)
    kl_div_two_level_backward_   kl_div_teacher_backward_   the same, written over the logits

They are registered with torch.library, each with a fake kernel (shapes only), so torch.compile sees
one opaque call instead of breaking the graph, and losses run on the meta device. An operator takes
tensors and plain values, so a target travels as its parts (TwoLevel or Teacher of target.py) with
the name of the path behind them.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from . import arguments, torch_kl_div, torch_teacher
from .reference import compute_dtype
from .target import Target, Teacher, TeacherTarget, TwoLevel, as_rows, check_floating

KINDS: dict[str, type[TwoLevel] | type[Teacher]] = {"two_level": TwoLevel, "teacher": Teacher}
NAMESPACE = str(__package__).replace(".", "__")  # a copy under another name has its own operators


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
        logits: (..., V), float32, bfloat16, float16 or (not with Triton) float64. They are not
            copied if the last dimension is contiguous and one stride spans the rows. With Triton,
            the largest of each row must lie within +-1e9; others may be -inf.
        target: a TwoLevelTarget, a TeacherTarget, or probabilities (V,) or (..., V), which are
            taken as TeacherTarget(p.log()): scaled to sum to 1, and NaN where one is negative. No
            gradient flows to a target.
        reduction: "batchmean" (mean over all rows: of logits (B, T, V) B T of them, where
            F.kl_div's own divides by B alone), "sum", or "none" (one value per row, (...)).
        inplace_backward: write the gradient over the logits in the backward, which saves a tensor
            of their size. The logits are destroyed, so a second backward pass raises.
        impl: "triton" (the default on CUDA), "torch" (the default elsewhere, and for float64), or
            "triton-simple" (the lesson, kernels/triton_simple.py; two-level targets only).
        row_weights: (...), a factor per row; 0 leaves a row out (padding), whatever is in it.
            "batchmean" divides by their sum: if all are 0, or if there are no rows, the mean is
            NaN, as in F.cross_entropy, and the gradient 0. No gradient flows to the weights.

    Returns:
        The loss in float32 (float64 for float64 logits), first derivatives in reverse mode only.

    Raises:
        TypeError, ValueError: a bad argument.
        RuntimeError: the path asked for cannot run here (nothing falls back silently), or a second
            or a forward-mode derivative is asked for.
    """
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    arguments.refuse_forward_mode("fused_kl_div", logits)
    shape, device, dtype = logits.shape, logits.device, logits.dtype
    target = arguments.resolve_target(target, shape, device, dtype, reduction)
    if isinstance(target, TeacherTarget) and target.logits is None:
        raise ValueError(
            "got TeacherTarget.from_hidden(...), which is for fused_linear_kl_div; pass "
            "TeacherTarget(teacher_logits)"
        )
    weights = arguments.resolve_row_weights(row_weights, shape[:-1], device, dtype)
    impl = arguments.resolve_impl(impl, device, dtype)
    rows = _rows_to_overwrite(logits) if inplace_backward else as_rows(logits)
    if rows.shape[0] > 1 and rows.stride(0) == 0:  # the gradient's rows would lie in one place
        rows = rows.contiguous()
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, *_ = _KlDiv.apply(rows, inplace_backward, target.kind, *target.parts, impl)
    else:
        loss, *_ = OPERATORS[target.kind][0](rows, *target.parts, impl)
    loss = weighted(loss, weights)
    if reduction == "none":
        return loss.view(shape[:-1])
    # Not loss.mean(): the gradient of a sum is one number, which the backward reads as such.
    return mean_of(loss.sum(), reduction, loss.shape[0], weights)


def weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of each row times its weight; 0 where that is 0, whatever the loss is."""
    return loss if weights is None else torch.where(weights == 0, 0.0, loss * weights)


def mean_of(total: Tensor, reduction: str, rows: int, weights: Tensor | None) -> Tensor:
    """Divide the summed loss by what "batchmean" divides by: the rows, or the sum of weights."""
    if reduction == "sum":
        return total
    return total / (rows if weights is None else weights.sum())


def factors(
    hidden: Tensor, dtype: torch.dtype, row_weights: Tensor | None, reduction: str
) -> Tensor:
    """g of (1), (N,): what the loss of each row counts, of stride 0 without weights. 0 for a row of
    weight 0, whatever the sum of weights is."""
    n = hidden.shape[0]
    if row_weights is None:
        one = hidden.new_ones(1, dtype=compute_dtype(dtype))
        return (one / n if reduction == "batchmean" else one).expand(n)
    if reduction != "batchmean":
        return row_weights
    return torch.where(row_weights == 0, 0.0, row_weights / row_weights.sum())


def _rows_to_overwrite(logits: Tensor) -> Tensor:
    """(N, V), a view of the logits; ValueError if there is none."""
    vocab = logits.shape[-1]
    if logits.stride(-1) == 1 and all(stride >= vocab for stride in logits.stride()[:-1]):
        try:
            return logits.view(logits.numel() // vocab, vocab)
        except RuntimeError:  # leading dimensions that no single stride spans
            pass
    raise ValueError(
        "inplace_backward=True needs logits with a contiguous last dimension and rows at one "
        f"stride, got shape {tuple(logits.shape)} with strides {logits.stride()}"
    )


def launchers(impl: str, device: torch.device, kind: str) -> ModuleType:
    """The module whose forward and backward run this path; TypeError or RuntimeError if none."""
    if impl == "torch":
        return torch_teacher if kind == "teacher" else torch_kl_div
    if impl == "triton-simple" and kind != "two_level":
        raise TypeError(
            f'impl="triton-simple" takes a TwoLevelTarget, got a {kind}; pass impl="triton"'
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


def parts_schema(kind: str) -> str:
    """The arguments of an operator that are a target's parts, as torch.library writes them."""
    names = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool"}
    return ", ".join(f"{names[t]} target_{name}" for name, t in get_type_hints(KINDS[kind]).items())


def unpack(kind: str, parts: Any, device: torch.device) -> tuple[ModuleType, Any]:
    """The module that runs this path, and the target as it takes it, of an operator's arguments."""
    *target, impl = parts
    return launchers(impl, device, kind), KINDS[kind](*target)


def _operators(kind: str) -> tuple[Any, Any, Any]:
    """Register the operators of a kind of target: forward, backward, backward_."""
    name, parts = f"{NAMESPACE}::kl_div_{kind}", f"{parts_schema(kind)}, str impl"
    saved = f"Tensor lse, Tensor norm, Tensor grad_loss, {parts}"
    custom_op = torch.library.custom_op
    schema = f"(Tensor logits, {parts}) -> (Tensor loss, Tensor lse, Tensor norm)"

    @custom_op(f"{name}_forward", mutates_args=(), schema=schema)
    def forward(logits: Tensor, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
        kernels, target = unpack(kind, parts, logits.device)
        return kernels.forward(logits, target)

    @forward.register_fake
    def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
        norm = (logits.shape[0], 3) if kind == "teacher" else logits.shape[0]
        return loss, torch.empty_like(loss), loss.new_empty(norm)

    @custom_op(f"{name}_backward", mutates_args=(), schema=f"(Tensor logits, {saved}) -> Tensor")
    def backward(logits: Tensor, lse: Tensor, norm: Tensor, g: Tensor, *parts: Any) -> Tensor:
        kernels, target = unpack(kind, parts, logits.device)
        out = torch_kl_div.empty_gradient(logits)
        kernels.backward(logits, lse, norm, target, g, out)
        return out

    @backward.register_fake
    def _(logits: Tensor, *_: Any) -> Tensor:
        return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))

    schema = f"(Tensor(a!) logits, {saved}) -> ()"

    @custom_op(f"{name}_backward_", mutates_args=("logits",), schema=schema)
    def backward_(logits: Tensor, lse: Tensor, norm: Tensor, g: Tensor, *parts: Any) -> None:
        kernels, target = unpack(kind, parts, logits.device)
        kernels.backward(logits, lse, norm, target, g, logits)

    return forward, backward, backward_


OPERATORS = {kind: _operators(kind) for kind in KINDS}


class _KlDiv(torch.autograd.Function):
    """loss, lse, norm of logits (N, V); the derivative of loss alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, inplace: bool, kind: str, *parts: Any) -> tuple[Tensor, ...]:
        return OPERATORS[kind][0](logits, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, ctx.inplace, ctx.kind, *parts = inputs
        ctx.options = [x for x in parts if isinstance(x, bool | str)]  # behind the tensors
        ctx.save_for_backward(logits, *output[1:], *parts[: len(parts) - len(ctx.options)])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, norm, *tensors = ctx.saved_tensors
        others = lse, norm, grad_loss, *tensors, *ctx.options
        _, new, over = OPERATORS[ctx.kind]
        if not ctx.inplace:
            grad = first_derivative("fused_kl_div", new, logits, *others)
        elif torch.is_grad_enabled():  # the graph would keep logits that are overwritten here
            refuse_second_derivative("fused_kl_div")
        else:
            grad = logits.detach()
            over(grad, *others)
        return grad, *(None,) * (2 + len(tensors) + len(ctx.options))


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
