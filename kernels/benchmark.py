"""Fused against unfused loss: time, traffic, memory, error.

    python -m kernels.benchmark
    python -m kernels.benchmark --rows 256 1024 4096 --dtype bfloat16 --plot benchmark.png --json

Times are medians over interleaved repetitions, +- half the interquartile range; forward runs
without gradients. On CUDA they are the device's, its queue filled and its L2 cache emptied
beforehand. "host" is the CPU's time to launch forward + backward: where it exceeds the device's,
the host sets the pace, unless a CUDA graph holds the launches.

Roofline is the least possible time over the time of forward + backward: the time to move what any
implementation must, at the speed of copying a large tensor on the same device. Without the LM head
that is the logits (and a teacher's) read twice and the gradient written; with it, hidden states and
weight (and a teacher's) read once and their gradients written, and the fraction is low, because
there arithmetic is the limit.

Memory is the peak of one forward + backward above its inputs: of CUDA's allocator, or on Linux of
the resident set (VmHWM). Error is the RMS error of the gradient of the logits or hidden states over
the RMS of that gradient in float64, in the first 16 rows: rounding the exact gradient to its dtype
leaves 2e-8 in float32 and 1.6e-3 in bfloat16. One token in 51 is a target token, at beta = 0: GPT-2
has 984 with an x among 50,257. Losses of other libraries take a dense P or one label per row.
"""

import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tyro.conf import arg

from . import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from .measure import copy_bandwidth, milliseconds, peak_megabytes
from .reference import kl_div
from .results import Row, format_table, plot

ERROR_ROWS = 16
HAS_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Options:
    """What to measure, and where."""

    rows: tuple[int, ...] = (256, 1024, 4096) if HAS_CUDA else (256, 1024)
    """numbers of rows N; one table each"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of logits or hidden states
    device: str = "cuda" if HAS_CUDA else "cpu"  # cpu, cuda or cuda:N
    vocab: int = 50257  # V, tokens in the vocabulary
    width: int = 1024  # C, of the hidden states
    seconds: float = 15.0  # to measure, per number of rows
    plot: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """an image to draw time and memory in"""
    json: bool = False  # end with one line of JSON


compiled = cache(lambda: torch.compile(kl_div, dynamic=False))  # imports much: on first use


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
        lambda m, h, w, t: m.fused_kl_div_loss(h, t.hidden, w, t.weight),
        "teacher", head=True, needs="fla.modules.fused_kl_div"),
    "Liger fused linear JSD, teacher": Loss(  # which is KL(P || softmax(z)) at beta = 0
        lambda m, h, w, t: m.LigerFusedLinearJSD(jsd_beta=0.0)(h, w, t.hidden, t.weight, None),
        "teacher", head=True, needs="liger_kernel.transformers.fused_linear_jsd"),
}  # fmt: skip
for _name in ("unfused", "unfused, compiled", "fused", "linear + unfused", "fused linear"):
    LOSSES[f"{_name}, teacher"] = replace(LOSSES[_name], target="teacher")


def make_inputs(options: Options, rows: int, head: bool, seed: int = 0) -> list[Tensor]:
    """Random logits, or hidden states and weight."""
    shapes = {(rows, options.vocab): 3.0}
    if head:
        shapes = {(rows, options.width): 1.0, (options.vocab, options.width): 0.05}
    device, dtype = options.device, getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
        for shape, scale in shapes.items()
    ]


def make_target(options: Options, rows: int, kind: str, head: bool) -> tuple[Any, Any]:
    """A two-level target; its probabilities for each row, "dense"; "labels", one for each row; or a
    "teacher". With it the target of the first rows, as kl_div takes it."""
    if kind == "teacher":
        make: Any = TeacherTarget.from_hidden if head else TeacherTarget
        first, *rest = make_inputs(options, rows, head, seed=1)
        return make(first, *rest), make(first[:ERROR_ROWS].double(), *(x.double() for x in rest))
    if kind == "labels":
        labels = torch.arange(rows, device=options.device) % options.vocab
        return labels, F.one_hot(labels[:ERROR_ROWS], options.vocab).double()
    target = TwoLevelTarget(torch.arange(options.vocab, device=options.device) % 51 == 0)
    if kind == "two-level":
        return target, target
    return target.dense().expand(rows, -1).contiguous(), target


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


def skip_reason(name: str, loss: Loss, device: torch.device) -> str:
    """Why a loss cannot be measured here; "" if it can."""
    if loss.needs:
        if device.type != "cuda":
            return "needs CUDA"
        try:
            import_module(loss.needs)
        except ImportError as error:
            return str(error)
    elif "compiled" in name and device.type == "cpu":
        if not shutil.which("g++"):
            return "torch.compile needs g++"
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            return "torch.compile needs vector instructions"  # its C++ does not compile without
    return ""


def measure(options: Options, rows: int, bandwidth: float, losses: Mapping[str, Loss]) -> list[Row]:
    """These losses at this many rows, repetitions interleaved, for half of the time."""
    device = torch.device(options.device)
    inputs, targets = cache(make_inputs), cache(make_target)
    table = [Row(name, rows, skip_reason(name, loss, device)) for name, loss in losses.items()]
    cases = []
    for row in (row for row in table if not row.skip_reason):
        loss = losses[row.name]
        target = targets(options, rows, loss.target, loss.head)
        case = Case(loss, inputs(options, rows, loss.head), target)
        case.forward()
        case.fwd_bwd()
        case.prepare()
        row.peak_mb = peak_megabytes(case.fwd_bwd, device)
        row.error = case.error()
        case.prepare()
        cases.append((row, case))
    end = time.perf_counter() + options.seconds / 2
    for repetition in range(50):
        if repetition >= 3 and time.perf_counter() > end:
            break
        for row, case in cases:
            row.forward.append(milliseconds(case.forward, device)[0])
            on_device, on_host = milliseconds(case.fwd_bwd, device)
            row.fwd_bwd.append(on_device)
            if device.type == "cuda":
                row.host.append(on_host)
            case.prepare()
    for row, case in cases:
        row.roofline = case.bytes / bandwidth / (statistics.median(row.fwd_bwd) / 1e3)
    return table


def main(arguments: list[str] | None = None) -> None:
    """The command line: the table of each number of rows, then files and JSON where asked for."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="python -m kernels.benchmark",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    hardware = f"{torch.get_num_threads()} threads"
    if not options.rows or min(*options.rows, options.vocab, options.width) < 1:
        sys.exit("error: --rows, --vocab, --width: expected at least 1 each")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        sys.exit(f"error: --device {options.device}: expected cpu, cuda or cuda:N")
    if options.plot and not options.plot.parent.is_dir():
        sys.exit(f"error: --plot {options.plot}: got no such folder; create it first")
    device = torch.device(options.device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            sys.exit(f"error: --device {device}: got {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device.index or 0)
        hardware = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(device)
    title = f"{device.type}, {hardware}, {options.dtype}, V = {options.vocab}, "
    title += f"C = {options.width}, torch {torch.__version__}"
    print(f"{title}; copy {bandwidth / 1e9:.1f} GB/s", flush=True)
    table = []
    for rows in options.rows:
        for head in (False, True):  # apart: see kernels/torch_kl_div.py on idle pages
            losses = {name: loss for name, loss in LOSSES.items() if loss.head == head}
            table += measure(options, rows, bandwidth, losses)
    print(format_table(table))
    if options.json:
        result = {"setting": title, "copy_gb_per_s": bandwidth / 1e9}
        print(json.dumps(result | {"table": [asdict(row) for row in table]}))
    if options.plot:
        try:
            plot(table, options.plot, title)
        except (OSError, ValueError) as error:  # a format that matplotlib does not know
            sys.exit(f"error: --plot {options.plot}: {error}")


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:
        # Threads that spin slow a busy machine. libgomp has read this when torch was loaded.
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, sys.orig_argv)
    main()
