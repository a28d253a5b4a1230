"""Fused against unfused loss: time, traffic, memory, error.

    python -m kernels.benchmark
    python -m kernels.benchmark --rows 256 1024 4096 --dtype bfloat16 --plot benchmark.png --json

Forward is timed without gradients, forward + backward with them; medians over interleaved
repetitions, +- half the distance between the quartiles. GB/s divides the bytes that any
implementation must move by the time of forward + backward: for the losses on logits each of N V
elements read twice and written once, for the losses with the LM head hidden states and weight read
and their gradients written. "copy" is its share of the bandwidth of copying a large tensor on the
same device. Memory is the peak of one forward + backward above what it was given: of CUDA's
allocator, or on Linux of the resident set (VmHWM). Error is the RMS of the error of the logits' or
hidden states' gradient over the RMS of that gradient in float64, in the first 16 rows. One token in
51 is a member, at beta = 0: about GPT-2's share of tokens with an x, 984 of 50,257.
"""

import argparse
import importlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from .measure import copy_bandwidth, milliseconds, peak_megabytes
from .reference import kl_div
from .results import Row, format_table, plot

ERROR_ROWS = 16


# Where liger-kernel keeps them; not in each of its releases.
LIGER = {
    "Liger log_softmax + KL": "liger_kernel.transformers.kl_div",
    "Liger fused linear KL": "liger_kernel.transformers.fused_linear_kl_div",
}


def _liger_kl(logits: Tensor, target: Tensor) -> Tensor:
    module = importlib.import_module(LIGER["Liger log_softmax + KL"])
    return module.LigerKLDIVLoss(reduction="batchmean")(F.log_softmax(logits, -1), target)


def _liger_linear_kl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    module = importlib.import_module(LIGER["Liger fused linear KL"])
    return module.LigerFusedLinearKLDivLoss()(hidden, weight, target)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(kl_div, dynamic=False)


ON_LOGITS: dict[str, Callable[..., Tensor]] = {
    "unfused": kl_div,
    "unfused, compiled": lambda z, target: _compiled()(z, target),
    "fused": fused_kl_div,
    "fused, in place": partial(fused_kl_div, inplace_backward=True),
    "Liger log_softmax + KL": _liger_kl,
}
WITH_HEAD: dict[str, Callable[..., Tensor]] = {
    "linear + unfused": lambda h, w, target: kl_div(F.linear(h, w), target),
    "fused linear": fused_linear_kl_div,
    "Liger fused linear KL": _liger_linear_kl,
}


Inputs = tuple[Tensor, ...]  # logits, or hidden states and weight
Losses = dict[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Setting:
    """What all rows of the table share."""

    device: torch.device
    dtype: torch.dtype
    vocab: int
    width: int

    def randn(self, *shape: int, scale: float) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=self.device)
        return x.mul_(scale).to(self.dtype)


class Case:
    """A loss and its inputs, ready to be run."""

    def __init__(self, name: str, loss: Callable[..., Tensor], inputs: Inputs) -> None:
        self.loss, self.given, self.in_place = loss, inputs, name == "fused, in place"
        self.inputs = tuple(x.clone() for x in inputs) if self.in_place else inputs
        rows, vocab = len(inputs[0]), inputs[-1].shape[1 if len(inputs) == 1 else 0]
        self.target: Any = TwoLevelTarget(torch.arange(vocab, device=inputs[0].device) % 51 == 0)
        if name in LIGER:  # takes nothing but probabilities for each row
            self.target = self.target.dense().expand(rows, vocab).contiguous()
        passes = 3 if len(inputs) == 1 else 2
        self.bytes = passes * sum(x.numel() * x.element_size() for x in inputs)

    def prepare(self) -> None:
        """What no step pays for: the last gradients dropped, overwritten logits restored."""
        if self.in_place:
            self.inputs[0].copy_(self.given[0])
        self.leaves = [x.detach().requires_grad_() for x in self.inputs]

    def forward(self) -> None:
        with torch.no_grad():
            self.loss(*self.inputs, self.target)

    def both(self) -> None:
        self.loss(*self.leaves, self.target).backward()

    def error(self) -> float:
        """Of the first gradient of the last step, over its first rows; rounding the exact gradient
        to its dtype alone leaves 2e-8 in float32 and 1.6e-3 in bfloat16."""
        got = self.leaves[0].grad
        assert got is not None
        exact = self.given[0][:ERROR_ROWS].double().requires_grad_()
        logits = exact if len(self.given) == 1 else F.linear(exact, self.given[1].double())
        target = self.target[:ERROR_ROWS] if isinstance(self.target, Tensor) else self.target
        (true,) = torch.autograd.grad(kl_div(logits, target, "sum") / len(got), exact)
        return ((got[:ERROR_ROWS].double() - true).norm() / true.norm()).item()


def why_not(name: str, setting: Setting) -> str:
    """Why a row cannot be measured here; "" if it can."""
    if name in LIGER:
        if setting.device.type != "cuda":
            return "needs CUDA"
        if find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        if find_spec(LIGER[name]) is None:
            return f"the liger-kernel installed has no {LIGER[name]}"
    if name == "unfused, compiled" and setting.device.type == "cpu" and not shutil.which("g++"):
        return "torch.compile needs g++"
    return ""


def measure(
    rows: int, setting: Setting, bandwidth: float, seconds: float, losses: Losses
) -> list[Row]:
    """All losses at this many rows, repetitions interleaved, for about this long."""
    device = setting.device
    logits = (setting.randn(rows, setting.vocab, scale=3.0),)
    hidden = setting.randn(rows, setting.width, scale=1.0)
    with_head = hidden, setting.randn(setting.vocab, setting.width, scale=0.05)
    table = {name: Row(name, rows, why_not(name, setting)) for name in losses}
    cases = {
        name: Case(name, loss, with_head if name in WITH_HEAD else logits)
        for name, loss in losses.items()
        if not table[name].why
    }
    for name, case in cases.items():
        case.forward()
        case.prepare()
        case.both()
        case.prepare()
        table[name].peak_mb = peak_megabytes(case.both, device)
        table[name].error = case.error()
        case.prepare()
    start, repetitions = time.perf_counter(), 0
    while repetitions < 3 or (time.perf_counter() - start < seconds and repetitions < 50):
        repetitions += 1
        for name, case in cases.items():
            table[name].forward.append(milliseconds(case.forward, device))
            table[name].both.append(milliseconds(case.both, device))
            case.prepare()
    for name, case in cases.items():
        speed = case.bytes / (statistics.median(table[name].both) / 1e3)
        table[name].gb_per_s, table[name].copy_share = speed / 1e9, speed / bandwidth
    return list(table.values())


def main(arguments: list[str] | None = None) -> None:
    """The command line: the table of each number of rows, then files and JSON where asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--rows", type=int, nargs="+", help="default: 256 1024, on CUDA also 4096")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each number of rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over rows")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    setting = Setting(options.device, getattr(torch, options.dtype), options.vocab, options.width)
    counts = options.rows or ([256, 1024, 4096] if options.device.type == "cuda" else [256, 1024])
    bandwidth = copy_bandwidth(options.device)
    threads = f"{torch.get_num_threads()} threads" if options.device.type == "cpu" else ""
    name = threads or torch.cuda.get_device_name(options.device)
    title = f"{options.device.type}, {name}, {options.dtype}, V = {options.vocab}, "
    title += f"C = {options.width}, torch {torch.__version__}"
    print(f"{title}; copy {bandwidth / 1e9:.1f} GB/s")
    table = []
    for rows in counts:
        for losses in ON_LOGITS, WITH_HEAD:  # apart: see kernels/torch_kl_div.py on idle pages
            table += measure(rows, setting, bandwidth, options.seconds / 2, losses)
    print(format_table(table))
    if options.plot:
        plot(table, options.plot, title)
    if options.json:
        result = {"setting": title, "copy_gb_per_s": bandwidth / 1e9}
        print(json.dumps(result | {"table": [asdict(row) for row in table]}))


if __name__ == "__main__":
    main()
