"""Fused against unfused loss: time, traffic, memory, error.

    python -m kernels.benchmark
    python -m kernels.benchmark --rows 256 1024 4096 --dtype bfloat16 --json
    python -m kernels.benchmark --rows 64 --vocab 128256 151936 262144

    forward_ms  median of 3 to 50 repetitions, without gradients; on CUDA the device's time, its
                queue filled and its L2 cache emptied beforehand
    fwd_bwd_ms  the same of forward + backward
    host_ms     the CPU's time to launch these, on CUDA: where it exceeds the device's, the host
                sets the pace, unless a CUDA graph holds the launches
    gb_per_s    over fwd_bwd_ms: the logits (and a teacher's) read twice, the gradient written; or
                with the LM head hidden states and weight (and a teacher's) read, gradients written
    of_copy     its share of the speed of a large copy; with the head arithmetic limits it
    peak_mb     peak memory of forward + backward above the inputs: of CUDA's allocator, or on Linux
                of the resident set (VmHWM)
    error       RMS error of the gradient of the logits or hidden states over the RMS of that
                gradient in float64, in the first 16 rows: rounding the exact gradient to its dtype
                leaves 2e-8 in float32 and 1.6e-3 in bfloat16

One token in 51 is a target token, at beta = 0: GPT-2 has 984 with an x among 50,257. A loss that
fails is a row that says why. The JSON has the times of every repetition.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from . import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from .measure import copy_bandwidth, format_table, milliseconds, peak_megabytes
from .reference import kl_div
from .target import Target

HAS_CUDA = torch.cuda.is_available()
ERROR_ROWS = 16
COLUMNS = {
    "loss": "", "forward_ms": ".4g", "fwd_bwd_ms": ".4g", "host_ms": ".4g", "gb_per_s": ".4g",
    "of_copy": ".0%", "peak_mb": ".1f", "error": ".1e", "failed": "",
}  # fmt: skip
compiled = cache(lambda: torch.compile(kl_div, dynamic=False))  # imports much: on first use


@dataclass(frozen=True)
class Options:
    """What to measure, and where."""

    rows: tuple[int, ...] = (256, 1024, 4096) if HAS_CUDA else (256, 1024)
    """measure these numbers of rows, a table for each"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # use this dtype
    device: Literal["cpu", "cuda"] = "cuda" if HAS_CUDA else "cpu"  # measure here
    vocab: tuple[int, ...] = (50257,)  # measure these sizes of the vocabulary
    width: int = 1024  # make hidden states this wide
    seconds: float = 15.0  # measure for this long per table
    json: bool = False  # end with one line of JSON


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
    teacher: bool = False  # whether the target is a teacher, as large as the student
    head: bool = False  # whether it takes hidden states and weight
    in_place: bool = False  # whether it overwrites the logits


LOSSES = {
    "unfused": Loss(kl_div),
    "unfused, compiled": Loss(lambda z, target: compiled()(z, target)),
    "fused": Loss(fused_kl_div),
    "linear + unfused": Loss(lambda h, w, target: kl_div(F.linear(h, w), target), head=True),
    "fused linear": Loss(fused_linear_kl_div, head=True),
}
LOSSES |= {f"{name}, teacher": replace(loss, teacher=True) for name, loss in LOSSES.items()} | {
    "fused, in place": Loss(partial(fused_kl_div, inplace_backward=True), in_place=True),
    "fused, simple kernels": Loss(partial(fused_kl_div, impl="triton-simple")),
    "flash-linear-attention, teacher": Loss(  # this and Liger need CUDA
        lambda h, w, t: import_module("fla.modules.fused_kl_div").fused_kl_div_loss(
            h, t.parts.logits, w, t.parts.weight),
        teacher=True, head=True),
    "Liger fused linear JSD, teacher": Loss(  # which is KL(P || softmax(z)) at beta = 0
        lambda h, w, t: import_module("liger_kernel.transformers.fused_linear_jsd")
        .LigerFusedLinearJSD(jsd_beta=0.0)(h, w, *t.parts[:2], None),
        teacher=True, head=True),
}  # fmt: skip


def make_inputs(size: Size, head: bool, seed: int = 0) -> list[Tensor]:
    """Random logits, or hidden states and weight."""
    shapes = [((size.rows, size.vocab), 3.0)]
    if head:
        shapes = [((size.rows, size.width), 1.0), ((size.vocab, size.width), 0.05)]
    draw = torch.Generator(size.device).manual_seed(seed)
    tensors = [torch.randn(s, generator=draw, device=size.device).mul_(x) for s, x in shapes]
    return [x.to(size.dtype) for x in tensors]


def make_target(size: Size, loss: Loss) -> tuple[Target, Target]:
    """What the loss takes, and the same for the first rows of logits in float64."""
    if not loss.teacher:
        target = TwoLevelTarget(torch.arange(size.vocab, device=size.device) % 51 == 0)
        return target, target
    make: Any = TeacherTarget.from_hidden if loss.head else TeacherTarget
    first, *rest = make_inputs(size, loss.head, seed=1)
    return make(first, *rest), make(first[:ERROR_ROWS].double(), *(x.double() for x in rest))


def relative_error(got: Tensor, inputs: list[Tensor], target: Target) -> float:
    """Of the gradient of the logits or hidden states, over the first rows."""
    exact = inputs[0][:ERROR_ROWS].double().requires_grad_()
    logits = F.linear(exact, inputs[1].double()) if inputs[1:] else exact
    (true,) = torch.autograd.grad(kl_div(logits, target, "sum") / len(got), exact)
    return ((got[:ERROR_ROWS].double() - true).norm() / true.norm()).item()


def measure(loss: Loss, size: Size, bandwidth: float, seconds: float) -> dict[str, Any]:
    """The numbers of a loss by column of the table; of times, a list of all repetitions."""
    device, inputs = size.device, make_inputs(size, loss.head)
    target, exact_target = make_target(size, loss)

    def prepare() -> list[Tensor]:
        """Drop the last gradients, and copy logits that are to be overwritten; not timed."""
        return [(x.clone() if loss.in_place else x).detach().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            loss.run(*inputs, target)

    def fwd_bwd() -> None:
        loss.run(*leaves, target).backward()

    leaves = prepare()
    forward()
    fwd_bwd()
    leaves = prepare()
    peak_mb = peak_megabytes(fwd_bwd, device)
    assert leaves[0].grad is not None
    error = relative_error(leaves[0].grad, inputs, exact_target)
    times: list[tuple[float, float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() < end):
        leaves = prepare()
        times.append((milliseconds(forward, device)[0], *milliseconds(fwd_bwd, device)))
    forward_ms, fwd_bwd_ms, host_ms = map(list, zip(*times, strict=True))
    passes = 2 + loss.teacher if loss.head else 3 + 2 * loss.teacher
    moved = passes * sum(x.nbytes for x in inputs)
    speed = moved / statistics.median(fwd_bwd_ms) * 1e3  # bytes per second
    row = {"forward_ms": forward_ms, "fwd_bwd_ms": fwd_bwd_ms, "peak_mb": peak_mb, "error": error}
    row |= {"gb_per_s": speed / 1e9, "of_copy": speed / bandwidth}
    return row | ({"host_ms": host_ms} if device.type == "cuda" else {})


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
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: this machine has no CUDA device; pass --device cpu")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name(device)
    title = f"{where}, {options.dtype}, C = {options.width}, torch {torch.__version__}"
    print(title, flush=True)
    bandwidth = copy_bandwidth(device)
    print(f"copy {bandwidth / 1e9:.1f} GB/s", flush=True)
    results = []
    for vocab, rows in itertools.product(options.vocab, options.rows):
        torch.compiler.reset()  # after eight sizes and modes it would run eagerly, in silence
        table = []
        for name, loss in LOSSES.items():
            print(f"... {name}", file=sys.stderr, flush=True)
            row: dict[str, Any] = {"loss": name, "rows": rows, "vocab": vocab}
            try:
                size = Size(rows, vocab, options.width, dtype, device)
                row |= measure(loss, size, bandwidth, options.seconds / len(LOSSES))
            except Exception as error:  # a library's, or a lack of memory: the other losses go on
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            table.append(row)
        print(f"\n{rows} rows, V = {vocab}\n{format_table(table, COLUMNS)}", flush=True)
        results += table
    if options.json:
        result = {"setting": title, "copy_gb_per_s": bandwidth / 1e9}
        print(json.dumps(result | {"table": results}))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:
        # Threads that spin slow a busy machine. libgomp has read this when torch was loaded.
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, sys.orig_argv)
    main()
