"""fused_kl_div: the public function, its operators, autograd, and the dispatch by device.

Each kind of target has three operators, on logits of shape (N, V):

    kl_div_two_level_forward     kl_div_teacher_forward     -> loss (N,), lse (N,), and norm
    kl_div_two_level_backward    kl_div_teacher_backward    -> dKL/dz times grad_loss, new, (N, V)
    kl_div_two_level_backward_   kl_div_teacher_backward_   the same, written over the logits

They are registered with torch.library, each with a fake kernel (shapes only), so torch.compile sees
one opaque call instead of breaking the graph, and losses run on the meta device. An operator takes
tensors and plain values: a target's parts (TwoLevel or Teacher of target.py) and the path's name.
"""

from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import arguments, torch_kl_div
from .reference import compute_dtype
from .target import Target, Teacher, TwoLevel, as_rows, check_floating

KINDS: dict[str, type[TwoLevel] | type[Teacher]] = {"two_level": TwoLevel, "teacher": Teacher}
SCHEMAS = {  # the last arguments of each operator: a target's parts, and the path
    "two_level": "Tensor mask, Tensor bitmasks, Tensor ids, Tensor levels, Tensor? beta, str impl",
    "teacher": "Tensor t, Tensor? t_weight, Tensor? mask, Tensor? bitmasks, Tensor? tilt, str impl",
}
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
            of their size unless they are copied. They are destroyed: a second backward pass raises.
        impl: "triton" (the default on CUDA), "torch" (the default elsewhere, and for float64), or
            "triton-simple" (the lesson, kernels/triton_simple.py; two-level targets only).
        row_weights: (...), a factor per row; 0 leaves a row out (padding), whatever is in it.
            "batchmean" divides by their sum: if all are 0, or if there are no rows, the mean is
            NaN, as in F.cross_entropy, and the gradient 0. No gradient flows to the weights.

    Returns:
        The loss in float32 (float64 for float64 logits), first derivatives in reverse mode only.

    Raises:
        TypeError, ValueError: a bad argument.
        RuntimeError: the path cannot run here (nothing falls back silently), or another derivative.
    """
    check_floating("logits", logits)
    shape, like = logits.shape, (logits.shape, logits.device, logits.dtype)
    target, impl, weights = arguments.resolve(target, reduction, impl, row_weights, *like)
    if isinstance(target.parts, Teacher) and target.parts.weight is not None:
        raise ValueError(
            "TeacherTarget.from_hidden(...) is for fused_linear_kl_div; pass TeacherTarget(logits)"
        )
    rows = as_rows(logits)
    if rows.shape[0] > 1 and rows.stride(0) == 0:  # the gradient's rows would lie in one place
        rows = rows.contiguous()
    grad = torch.is_grad_enabled() and logits.requires_grad
    # `apply` refuses forward mode; torch.compile cannot trace it where no gradient is needed.
    run = _KlDiv.apply if grad or not torch.compiler.is_compiling() else _KlDiv.forward
    loss, *_ = run(rows, inplace_backward, target.kind, *target.parts, impl)
    loss = reduced(loss, weights, reduction)
    return loss.view(shape[:-1]) if reduction == "none" else loss


def reduced(loss: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The loss of each row (N,) times its weight, 0 where that is 0, whatever the loss is; reduced.
    Not by mean(): the gradient of a sum is one number, which the backward reads as such."""
    if weights is not None:
        loss = torch.where(weights == 0, 0.0, loss * weights)
    if reduction == "none":
        return loss
    divisor = (loss.shape[0] if weights is None else weights.sum()) if reduction != "sum" else 1
    return loss.sum() / divisor


def launchers(impl: str, device: torch.device) -> Any:
    """The module whose forward and backward run this path; RuntimeError if it cannot run."""
    try:  # here and not above: the package works without Triton
        module: Any = import_module(f".{arguments.MODULES[impl]}", __package__)
    except ImportError as error:
        raise RuntimeError(f'impl="{impl}" needs Triton: install it, or pass "torch"') from error
    if not (impl == "torch" or device.type == "cuda" or module.triton.knobs.runtime.interpret):
        raise RuntimeError(
            f'impl="{impl}" needs CUDA tensors, got {device}; pass "torch", or set '
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
    return module


def unpack(kind: str, parts: Any, device: torch.device) -> tuple[Any, Any]:
    """The module that runs this path, and the target as it takes it, of an operator's arguments."""
    *target, impl = parts
    return launchers(impl, device), KINDS[kind](*target)


def _operators(kind: str) -> tuple[Any, Any, Any]:
    """Register the operators of a kind of target: forward, backward, backward_."""
    name = f"{NAMESPACE}::kl_div_{kind}"
    saved = f"Tensor lse, Tensor norm, Tensor grad_loss, {SCHEMAS[kind]}"
    custom_op = torch.library.custom_op

    def write_gradient(
        out: Tensor, logits: Tensor, lse: Tensor, norm: Tensor, g: Tensor, *parts: Any
    ) -> Tensor:
        kernels, target = unpack(kind, parts, logits.device)
        kernels.backward(logits, lse, norm, target, g, out)
        return out

    schema = f"(Tensor logits, {SCHEMAS[kind]}) -> (Tensor loss, Tensor lse, Tensor norm)"

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
    def backward(logits: Tensor, *others: Any) -> Tensor:
        return write_gradient(torch_kl_div.empty_gradient(logits), logits, *others)

    @backward.register_fake
    def _(logits: Tensor, *_: Any) -> Tensor:
        return logits.new_empty_strided(logits.shape, torch_kl_div.gradient_strides(logits))

    schema = f"(Tensor(a!) logits, {saved}) -> ()"

    @custom_op(f"{name}_backward_", mutates_args=("logits",), schema=schema)
    def backward_(logits: Tensor, *others: Any) -> None:
        write_gradient(logits, logits, *others)

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
        logits, ctx.inplace, ctx.kind, *target, ctx.impl = inputs
        ctx.save_for_backward(logits, *output[1:], *target)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, norm, *target = ctx.saved_tensors
        others = lse, norm, grad_loss, *target, ctx.impl
        nothing = (None,) * (3 + len(target))
        _, new, over = OPERATORS[ctx.kind]
        if not ctx.inplace:
            return first_derivative(new, logits, *others), *nothing
        if torch.is_grad_enabled():  # the graph would keep logits that are overwritten here
            raise RuntimeError(
                "inplace_backward=True has no create_graph=True and no torch.func.grad, which keep "
                "the logits that it overwrites; pass inplace_backward=False"
            )
        grad = logits.detach()
        over(grad, *others)
        return grad, *nothing


def first_derivative(operator: Any, *inputs: Any) -> Any:
    """The results of an operator that computes a derivative; theirs is refused, not 0."""
    needs_graph = torch.is_grad_enabled()  # create_graph=True, or torch.func.grad
    return _FirstDerivative.apply(operator, *inputs) if needs_graph else operator(*inputs)


class _FirstDerivative(torch.autograd.Function):
    """Not the operator's register_autograd, which breaks torch.func.grad and vmap."""

    generate_vmap_rule = True
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def forward(operator: Any, *inputs: Any) -> Any:
        return operator(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "the fused losses have first derivatives only, got a request for a second one "
            "(create_graph=True); use kernels.reference.kl_div, which has all"
        )
