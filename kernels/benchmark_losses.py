"""The losses that kernels/benchmark.py measures, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from .reference import kl_div

ERROR_ROWS = 16
compiled = cache(lambda: torch.compile(kl_div, dynamic=False))  # imports much: on first use


class Size(NamedTuple):
    """Of the inputs: rows N, vocabulary V, width C of the hidden states."""

    rows: int
    vocab: int
    width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Loss:
    """A loss to be measured: run(logits, target), or run(hidden, weight, target)."""

    run: Callable[..., Tensor]
    target: str = "two-level"  # what it takes: see make_target
    head: bool = False  # whether it takes hidden states and weight
    in_place: bool = False  # whether it overwrites the logits
    needs: str = ""  # a module to import, which needs CUDA; then the first argument of run


LOSSES = {
    "unfused": Loss(kl_div),
    "unfused, compiled": Loss(lambda z, target: compiled()(z, target)),
    "fused": Loss(fused_kl_div),
    "fused, in place": Loss(partial(fused_kl_div, inplace_backward=True), in_place=True),
    "fused, simple kernels": Loss(
        lambda _, z, target: fused_kl_div(z, target, impl="triton-simple"), needs="triton"),
    "Liger log_softmax + KL": Loss(
        lambda m, z, p: m.LigerKLDIVLoss(reduction="batchmean")(F.log_softmax(z, -1), p),
        "dense", needs="liger_kernel.transformers.kl_div"),
    "flash-attention cross entropy": Loss(
        lambda m, z, labels: m.cross_entropy_loss(z, labels)[0].mean(),
        "labels", needs="flash_attn.ops.triton.cross_entropy"),
    "unsloth cross entropy": Loss(
        lambda m, z, labels: m.fast_cross_entropy_loss(z[None], labels[None]),
        "labels", needs="unsloth.kernels.cross_entropy_loss"),
    "linear + unfused": Loss(lambda h, w, target: kl_div(F.linear(h, w), target), head=True),
    "fused linear": Loss(fused_linear_kl_div, head=True),
    "Liger fused linear KL": Loss(
        lambda m, h, w, p: m.LigerFusedLinearKLDivLoss()(h, w, p),
        "dense", head=True, needs="liger_kernel.transformers.fused_linear_kl_div"),
    "flash-linear-attention, teacher": Loss(
        lambda m, h, w, t: m.fused_kl_div_loss(h, t.parts.logits, w, t.parts.weight),
        "teacher", head=True, needs="fla.modules.fused_kl_div"),
    "Liger fused linear JSD, teacher": Loss(  # which is KL(P || softmax(z)) at beta = 0
        lambda m, h, w, t: m.LigerFusedLinearJSD(jsd_beta=0.0)(h, w, *t.parts[:2], None),
        "teacher", head=True, needs="liger_kernel.transformers.fused_linear_jsd"),
}  # fmt: skip
for _name in ("unfused", "unfused, compiled", "fused", "linear + unfused", "fused linear"):
    LOSSES[f"{_name}, teacher"] = replace(LOSSES[_name], target="teacher")


def make_inputs(size: Size, head: bool, seed: int = 0) -> list[Tensor]:
    """Random logits, or hidden states and weight."""
    shapes = {(size.rows, size.vocab): 3.0}
    if head:
        shapes = {(size.rows, size.width): 1.0, (size.vocab, size.width): 0.05}
    generator = torch.Generator(size.device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=size.device)
    return [draw(shape).mul_(scale).to(size.dtype) for shape, scale in shapes.items()]


def make_target(size: Size, kind: str, head: bool) -> tuple[Any, Any]:
    """A two-level target; its probabilities for each row, "dense"; "labels", one for each row; or a
    "teacher". With it the target of the first rows, as kl_div takes it."""
    if kind == "teacher":
        make: Any = TeacherTarget.from_hidden if head else TeacherTarget
        first, *rest = make_inputs(size, head, seed=1)
        return make(first, *rest), make(first[:ERROR_ROWS].double(), *(x.double() for x in rest))
    if kind == "labels":
        labels = torch.arange(size.rows, device=size.device) % size.vocab
        return labels, F.one_hot(labels[:ERROR_ROWS], size.vocab).double()
    target = TwoLevelTarget(torch.arange(size.vocab, device=size.device) % 51 == 0)
    if kind == "two-level":
        return target, target
    return target.dense().expand(size.rows, -1).contiguous(), target


class Case:
    """A loss, its inputs and its target, ready to be run."""

    def __init__(self, loss: Loss, inputs: list[Tensor], targets: tuple[Any, Any]) -> None:
        self.run = partial(loss.run, import_module(loss.needs)) if loss.needs else loss.run
        self.target, self.exact_target = targets
        self.inputs, self.in_place = inputs, loss.in_place
        teacher = loss.target == "teacher"  # as large as the student
        passes = 2 + teacher if loss.head else 3 + 2 * teacher
        self.bytes = passes * sum(x.nbytes for x in inputs)
        self.prepare()

    def prepare(self) -> None:
        """Drop the last gradients, and copy logits that are to be overwritten; not timed."""
        inputs = [x.clone() for x in self.inputs] if self.in_place else self.inputs
        self.leaves = [x.detach().requires_grad_() for x in inputs]

    def forward(self) -> None:
        """The loss without gradients."""
        with torch.no_grad():
            self.run(*self.inputs, self.target)

    def fwd_bwd(self) -> None:
        """The loss and its gradients."""
        self.run(*self.leaves, self.target).backward()

    def error(self) -> float:
        """Relative error of the first gradient of the last step, over its first rows."""
        got = self.leaves[0].grad
        assert got is not None
        exact = self.inputs[0][:ERROR_ROWS].double().requires_grad_()
        head = self.inputs[1:]
        logits = F.linear(exact, head[0].double()) if head else exact
        (true,) = torch.autograd.grad(kl_div(logits, self.exact_target, "sum") / len(got), exact)
        return ((got[:ERROR_ROWS].double() - true).norm() / true.norm()).item()
