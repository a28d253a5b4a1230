"""Fused against unfused loss: time, traffic, memory, error.

    python -m kernels.benchmark
    python -m kernels.benchmark --rows 256 1024 4096 --dtype bfloat16 --json
    python -m kernels.benchmark --rows 64 --vocab 128256 151936 262144

Times are medians over interleaved repetitions, +- half the interquartile range; forward runs
without gradients. On CUDA they are the device's, its queue filled and its L2 cache emptied
beforehand. "host" is the CPU's time to launch forward + backward: where it exceeds the device's,
the host sets the pace, unless a CUDA graph holds the launches.

GB/s is what any implementation must move, over the time of forward + backward: without the LM head
the logits (and a teacher's) read twice and the gradient written; with it, hidden states and weight
(and a teacher's) read once and their gradients written. "of copy" is its share of the speed of
copying a large tensor on the same device; with the head it is low, for arithmetic is the limit.

Memory is the peak of one forward + backward above its inputs: of CUDA's allocator, or on Linux of
the resident set (VmHWM). Error is the RMS error of the gradient of the logits or hidden states over
the RMS of that gradient in float64, in the first 16 rows: rounding the exact gradient to its dtype
leaves 2e-8 in float32 and 1.6e-3 in bfloat16. One token in 51 is a target token, at beta = 0: GPT-2
has 984 with an x among 50,257. Losses of other libraries take a dense P or one label per row. A
loss that fails is a row that says why.
"""

import gc
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
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from . import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from .measure import copy_bandwidth, device_name, milliseconds, peak_megabytes
from .reference import kl_div
from .results import Row, format_table

ERROR_ROWS = 16
HAS_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Options:
    """What to measure, and where."""

    rows: tuple[int, ...] = (256, 1024, 4096) if HAS_CUDA else (256, 1024)
    """numbers of rows N; one table each"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of logits or hidden states
    device: str = "cuda" if HAS_CUDA else "cpu"  # cpu, cuda or cuda:N
    vocab: tuple[int, ...] = (50257,)  # sizes V of the vocabulary; tables for each
    width: int = 1024  # C, of the hidden states
    seconds: float = 15.0  # to measure, per table
    json: bool = False  # end with one line of JSON


@dataclass(frozen=True)
class Size:
    """Of one table: rows N, vocabulary V, width C; the dtype's name and the device."""

    rows: int
    vocab: int
    width: int
    dtype: str
    device: torch.device


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


def make_inputs(size: Size, head: bool, seed: int = 0) -> list[Tensor]:
    """Random logits, or hidden states and weight."""
    shapes = {(size.rows, size.vocab): 3.0}
    if head:
        shapes = {(size.rows, size.width): 1.0, (size.vocab, size.width): 0.05}
    generator = torch.Generator(size.device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=size.device)
        .mul_(scale)
        .to(getattr(torch, size.dtype))
        for shape, scale in shapes.items()
    ]


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


def skip_reason(name: str, loss: Loss, device: torch.device) -> str:
    """Why a loss cannot be measured here; "" if it can be tried."""
    if loss.needs and device.type != "cuda":
        return "needs CUDA"
    if "compiled" in name and device.type == "cpu":
        if not shutil.which("g++"):
            return "torch.compile needs g++"
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            return "torch.compile needs vector instructions"  # its C++ does not compile without
    return ""


def attempt(row: Row, device: torch.device, step: Callable[[], object]) -> None:
    """Run a step of a loss; where it fails, the row says why."""
    try:
        step()
    except Exception as error:  # a library's, or a lack of memory: the other losses go on
        row.skip_reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    if row.skip_reason:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(size: Size, bandwidth: float, losses: Mapping[str, Loss], seconds: float) -> list[Row]:
    """These losses at this size, repetitions interleaved, for so many seconds."""
    device = size.device
    inputs, targets = cache(make_inputs), cache(make_target)
    cases: dict[str, Case] = {}

    def start(row: Row, loss: Loss) -> None:
        target = targets(size, loss.target, loss.head)
        case = Case(loss, inputs(size, loss.head), target)
        case.forward()
        case.fwd_bwd()
        case.prepare()
        row.peak_mb = peak_megabytes(case.fwd_bwd, device)
        row.error = case.error()
        case.prepare()
        cases[row.name] = case

    def repeat(row: Row, case: Case) -> None:
        row.forward.append(milliseconds(case.forward, device)[0])
        on_device, on_host = milliseconds(case.fwd_bwd, device)
        row.fwd_bwd.append(on_device)
        if device.type == "cuda":
            row.host.append(on_host)
        case.prepare()

    table = [
        Row(name, size.rows, size.vocab, skip_reason(name, loss, device))
        for name, loss in losses.items()
    ]
    for i, row in enumerate(table, start=1):
        if not row.skip_reason:
            print(f"... {row.name} ({i} of {len(table)})", file=sys.stderr, flush=True)
            attempt(row, device, partial(start, row, losses[row.name]))
    end = time.perf_counter() + seconds
    for repetition in range(50):
        if repetition >= 3 and time.perf_counter() > end:
            break
        for row in table:
            if not row.skip_reason:
                attempt(row, device, partial(repeat, row, cases[row.name]))
    for row in table:
        if not row.skip_reason:
            bytes_per_second = cases[row.name].bytes / (statistics.median(row.fwd_bwd) / 1e3)
            row.gb_per_s, row.of_copy = bytes_per_second / 1e9, bytes_per_second / bandwidth
    return table


def main(arguments: list[str] | None = None) -> None:
    """The command line: a table for each size as it is done, then JSON where asked for."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="python -m kernels.benchmark",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if not options.rows or min(*options.rows, *options.vocab, options.width) < 1:
        sys.exit("error: --rows, --vocab, --width: expected at least 1 each")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        sys.exit(f"error: --device {options.device}: expected cpu, cuda or cuda:N")
    device = torch.device(options.device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            sys.exit(f"error: --device {device}: got {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device.index or 0)
    title = (
        f"{device_name(device)}, {options.dtype}, C = {options.width}, torch {torch.__version__}"
    )
    print(title, flush=True)
    bandwidth = copy_bandwidth(device)
    print(f"copy {bandwidth / 1e9:.1f} GB/s", flush=True)
    results: list[Row] = []
    for vocab in options.vocab:
        for rows in options.rows:
            size = Size(rows, vocab, options.width, options.dtype, device)
            table = []
            for head in (False, True):  # apart: see kernels/torch_kl_div.py on idle pages
                losses = {name: loss for name, loss in LOSSES.items() if loss.head == head}
                table += measure(size, bandwidth, losses, options.seconds / 2)
            print(f"\n{rows} rows, V = {vocab}\n{format_table(table)}", flush=True)
            results += table
    if options.json:
        result = {"setting": title, "copy_gb_per_s": bandwidth / 1e9}
        print(json.dumps(result | {"table": [asdict(row) for row in results]}))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:
        # Threads that spin slow a busy machine. libgomp has read this when torch was loaded.
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, sys.orig_argv)
    main()
