"""The benchmark at small sizes, and the times and peak memory that it measures."""

import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels import benchmark, fused_kl_div, fused_linear_kl_div, measure
from kernels.benchmark import LOSSES, Loss
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, two_level

ROOT = Path(__file__).parents[2]
ROWS, VOCAB, WIDTH = 256, 50257, 16  # where memory is measured
USUAL = "unfused", "fused", "linear + unfused", "fused linear"


def two_heads(hidden, teacher, weight, teacher_weight):
    return kl_div(F.linear(hidden, weight), F.linear(teacher, teacher_weight).softmax(-1))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command, on this machine's device; returns its output and its rows. The compiled
    losses stay eager, to save minutes, and other libraries are stood in for by the definition."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("gc.collect", int)  # which takes a second, before each loss
    fla = SimpleNamespace(fused_kl_div_loss=two_heads)
    liger = SimpleNamespace(
        LigerFusedLinearJSD=lambda jsd_beta: lambda h, w, t, v, labels: two_heads(h, t, w, v)
    )
    monkeypatch.setitem(sys.modules, "fla.modules.fused_kl_div", fla)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_jsd", liger)

    def call(*arguments, losses=LOSSES):
        monkeypatch.setattr(benchmark, "LOSSES", losses)
        benchmark.compiled.cache_clear()
        options = ["--device", DEVICE, "--width", "8", "--seconds", "0", "--json"]
        benchmark.main([*options, *arguments])
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)["table"]

    yield call
    benchmark.compiled.cache_clear()


def test_every_loss_is_measured_and_its_gradient_exact(run):
    """A line of the table and of the JSON for each."""
    lines, table = run("--rows", "3", "--vocab", "203")
    assert [row["loss"] for row in table] == list(LOSSES)
    for row, line in zip(table, lines[-len(LOSSES) :], strict=True):
        if row["loss"] == "fused, simple kernels" and find_spec("triton") is None:
            continue
        assert row["error"] < 1e-5
        assert len(row["forward_ms"]) == len(row["fwd_bwd_ms"]) == 3
        median = statistics.median(row["fwd_bwd_ms"])
        assert line.removeprefix(row["loss"]).split()[1] == f"{median:.4g}"
        teacher, head = "teacher" in row["loss"], "linear" in row["loss"]
        passes = 2 + teacher if head else 3 + 2 * teacher
        moved = passes * ((3 + 203) * 8 if head else 3 * 203) * 4  # bytes
        assert row["gb_per_s"] == pytest.approx(moved / median / 1e6)
        assert "peak_mb" in row


def test_large_vocabularies_are_measured(run):
    """Those of Llama 3, Qwen 2.5 and Gemma, a table for each, at two rows: no less exact than the
    unfused losses, but for a unit in the last place, which a GPU's sums may be off."""
    losses = {name: LOSSES[name] for x in USUAL for name in (x, f"{x}, teacher")}
    sizes = 128256, 151936, 262144
    lines, table = run("--rows", "2", "--vocab", *map(str, sizes), losses=losses)
    assert [line for line in lines if " rows" in line] == [f"2 rows, V = {v}" for v in sizes]
    for vocab in sizes:
        errors = {row["loss"]: row["error"] for row in table if row["vocab"] == vocab}
        for teacher in ("", ", teacher"):
            assert errors[f"fused{teacher}"] <= errors[f"unfused{teacher}"] + 2**-24
            product = errors[f"linear + unfused{teacher}"]  # most is that of the float32 products
            assert errors[f"fused linear{teacher}"] <= 1.2 * product


def test_a_loss_that_fails_is_a_row_and_the_others_are_measured(run, monkeypatch):
    """One whose library is not installed, and one that runs out of memory. Each repetition is a
    forward, and a forward + backward."""
    calls = []

    def recorded(z, target):
        calls.append(torch.is_grad_enabled())
        return fused_kl_div(z, target)

    def fails(z, target):
        raise torch.OutOfMemoryError("Tried to allocate 99 GiB.\nMore lines")

    monkeypatch.setitem(sys.modules, "fla.modules.fused_kl_div", None)
    library = LOSSES["flash-linear-attention, teacher"]
    losses = {"fused": Loss(recorded), "large": Loss(fails), "library": library}
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e9)
    lines, (fused, large, library) = run("--rows", "2", "--vocab", "203", losses=losses)
    assert calls == [False, True, True] + 3 * [False, True]
    assert fused["of_copy"] == pytest.approx(fused["gb_per_s"])
    assert large["failed"] == "OutOfMemoryError: Tried to allocate 99 GiB."
    assert re.fullmatch(rf"large( +-)+ +{re.escape(large['failed'])}", lines[-2])
    assert "fla" in library["failed"]


def test_the_benchmark_runs_on_cuda(gpu, run, monkeypatch):
    """By the clock of the second device, which stands still."""
    pytest.importorskip("triton")
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 1)  # not 256 MB before each time
    _, table = run("--device", "cuda", "--rows", "4", "--vocab", "211")
    for row in table:
        assert row["forward_ms"] == row["fwd_bwd_ms"] == [1.0] * 3, row
        assert all(0 < time < math.inf for time in row["host_ms"])
    assert gpu.launches()["triton"] > 0


def test_threads_of_the_command_spin_briefly():
    """libgomp prints the value that it has read, once for each time that it was loaded."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    command = [sys.executable, "-m", "kernels.benchmark", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "--rows" in result.stdout
    values = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    if not values:
        pytest.skip("this build of PyTorch has another OpenMP")
    assert values[-1] == "1000"


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--rows", "0"], ["--rows"]])
def test_what_cannot_be_measured_ends_in_one_line(arguments, monkeypatch):
    """Before anything is measured: a device that is not there, no rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^error: {arguments[0]}.*: .*"):
        benchmark.main(arguments)


def test_the_queue_is_filled_before_the_events_and_the_host_is_timed_apart(monkeypatch):
    """On CUDA the device sleeps while the host launches: its time is between the events alone."""
    calls = []
    event = SimpleNamespace(record=lambda: calls.append("event"), elapsed_time=lambda other: 7.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    device, host = measure.milliseconds(lambda: calls.append("step"), torch.device("cuda:1"))
    assert calls == ["synchronize", "sleep", "event", "step", "event", "synchronize"]
    assert device == 7.0
    assert 0 < host < 7.0


def measured_peaks():
    """In MB: of two tensors of 40 MB at the same time, and of one after the other; of the fused
    loss, in place too, and of the linear one in chunks of 16 rows. Of the losses the least of five
    each: what else the process does only adds."""
    target = two_level(VOCAB)
    shapes = (ROWS, VOCAB), (ROWS, WIDTH), (VOCAB, WIDTH)
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    logits, hidden, weight = leaves

    def ones():
        return torch.ones(10_000_000, device=DEVICE)

    def peak(step):
        return measure.peak_megabytes(step, torch.device(DEVICE))

    def peak_of_loss(loss):
        peaks = []
        for _ in range(6):
            for leaf in leaves:
                leaf.grad = None
            peaks.append(peak(lambda: loss().backward()))
        return peaks[0] and min(peaks[1:])  # the first one warms up

    return {
        "together": peak(lambda: (ones(), ones())),  # first: it must not stand for the other
        "one by one": peak(lambda: ones().sum() + ones().sum()),
        "fused": peak_of_loss(lambda: fused_kl_div(logits, target)),
        "in place": peak_of_loss(lambda: fused_kl_div(logits, target, inplace_backward=True)),
        "linear": peak_of_loss(lambda: fused_linear_kl_div(hidden, weight, target, chunk_rows=16)),
    }


def test_peak_memory_is_that_of_the_largest_moment_and_within_the_losses_bounds():
    """Two tensors of 40 MB: 40 one after the other, 80 at the same time. Of 256 rows of 50,257 in
    float32, 51 MB, the fused loss takes one such buffer, in place none, and the linear one, in
    chunks of 16 rows, less than half: it never holds all logits. Another 8 MB are allowed: 2 MB of
    scratch, rounding to 2 MB pages, and what malloc keeps. In a process of its own, where no other
    test's threads take memory meanwhile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peaks = process.submit(measured_peaks).result()
    if None in peaks.values():
        pytest.skip("neither CUDA nor Linux")
    assert peaks["one by one"] == pytest.approx(40, abs=4)
    assert peaks["together"] == pytest.approx(80, abs=4)
    buffer, spare = ROWS * VOCAB * 4 / 1e6, 8
    assert peaks["fused"] < buffer + spare
    assert peaks["linear"] < buffer / 2
    assert peaks["in place"] < spare
