"""Fused against unfused loss: time, traffic, memory, error.

    python -m kernels.benchmark
    python -m kernels.benchmark --rows 256 1024 4096 --dtype bfloat16 --json
    python -m kernels.benchmark --rows 64 --vocab 128256 151936 262144

Times are medians over interleaved repetitions, +- half the interquartile range; forward runs
without gradients. On CUDA they are the device's, its queue filled and its L2 cache emptied
beforehand. "host" is the CPU's time to launch forward + backward: where it exceeds the device's,
the host sets the pace, unless a CUDA graph holds the launches.

GB/s is what a forward and a backward that each read the logits move, over the time of both: without
the LM head the logits (and a teacher's) read twice and the gradient written; with it, hidden states
and weight (and a teacher's) read once and their gradients written. "of copy" is its share of the
speed of copying a large tensor on the same device; with the head arithmetic limits it.

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
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Literal

import torch
import tyro

from .benchmark_losses import LOSSES, Case, Loss, Size, make_inputs, make_target
from .measure import aligned, copy_bandwidth, device_name, milliseconds, peak_megabytes

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


@dataclass
class Row:
    """One loss at one size; with a reason where it was not measured."""

    name: str
    rows: int
    vocab: int
    skip_reason: str = ""
    forward: list[float] = field(default_factory=list)  # ms, one per repetition
    fwd_bwd: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # of forward + backward, on CUDA
    gb_per_s: float | None = None
    of_copy: float | None = None
    peak_mb: float | None = None
    error: float | None = None


def timing(times: list[float]) -> str:
    """Median and half the interquartile range."""
    if not times:
        return "-"
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.4g} +- {(high - low) / 2:.2g}"


def format_table(table: list[Row]) -> str:
    """The rows in aligned columns under a head; without the host's times if there are none."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    columns = {
        "loss": [row.name for row in table],
        "forward ms": [timing(row.forward) for row in table],
        "fwd+bwd ms": [timing(row.fwd_bwd) for row in table],
        "host ms": [timing(row.host) for row in table] if any(r.host for r in table) else [],
        "GB/s": [cell(row.gb_per_s, ".4g") for row in table],
        "of copy": [cell(row.of_copy, ".0%") for row in table],
        "peak MB": [cell(row.peak_mb, ".1f") for row in table],
        "error": [cell(row.error, ".1e") for row in table],
        "": [row.skip_reason for row in table],
    }
    return aligned({head: cells for head, cells in columns.items() if cells})


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
            size = Size(rows, vocab, options.width, getattr(torch, options.dtype), device)
            torch.compiler.reset()  # after eight sizes and modes it would run eagerly, in silence
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
