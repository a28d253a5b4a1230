"""The benchmark at small sizes: every loss runs, measurements measure, and skipped rows say why."""

import json
import os
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels import benchmark, benchmark_losses, fused_kl_div, fused_linear_kl_div, measure
from kernels.benchmark import skip_reason
from kernels.benchmark_losses import LOSSES, Case, Loss, Size, make_inputs, make_target
from tests.kernels.kl_cases import DEVICE

ROOT = Path(__file__).parents[2]
SIZE = Size(2, 203, 8, torch.float32, torch.device(DEVICE))
SIZES = ["--rows", "3", "5", "--vocab", "1001", "--width", "16", "--seconds", "0", "--device"]


@pytest.fixture
def eager(monkeypatch):
    """The compiled losses stay eager, to save minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    benchmark_losses.compiled.cache_clear()
    yield
    benchmark_losses.compiled.cache_clear()


def test_every_loss_is_measured_or_says_why_not(capsys, eager):
    """A table for each size and the JSON line; the device is named, and each loss as it begins."""
    benchmark.main([*SIZES, DEVICE, "--json"])
    out, progress = capsys.readouterr()
    first, copy, *lines, last = out.splitlines()
    assert first.startswith(measure.device_name(torch.device(DEVICE)))
    assert float(copy.split()[1]) > 0
    table = json.loads(last)["table"]
    assert [row["rows"] for row in table] == [3] * len(LOSSES) + [5] * len(LOSSES)
    assert [line for line in lines if " rows" in line] == [f"{n} rows, V = 1001" for n in (3, 5)]
    shown = [line for line in lines if line.startswith(tuple(LOSSES))]
    for row, line in zip(table, shown, strict=True):
        assert line.startswith(row["name"])
        measured = [row[key] for key in ("forward", "fwd_bwd", "gb_per_s", "peak_mb", "error")]
        if row["skip_reason"]:
            narrow = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
            assert LOSSES[row["name"]].needs or (narrow and "compiled" in row["name"])
            assert not any(measured)
            assert line.endswith(row["skip_reason"])
        else:
            assert len(row["forward"]) == len(row["fwd_bwd"]) == 3
            assert row["error"] < 1e-5
            assert f"... {row['name']} (" in progress
            assert " - " not in line
            assert re.search(r"\d \+- \d", line)


@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
def test_large_vocabularies_are_measured(vocab, capsys, eager):
    """Those of Llama 3, Qwen 2.5 and Gemma, at two rows: no less exact than the unfused losses, but
    for a unit in the last place, which a GPU's sums may be off."""
    sizes = ["--rows", "2", "--vocab", str(vocab), "--width", "8", "--seconds", "0"]
    benchmark.main([*sizes, "--device", DEVICE, "--json"])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert {row["vocab"] for row in table} == {vocab}
    errors = {row["name"]: row["error"] for row in table}
    for teacher in ("", ", teacher"):
        assert errors[f"fused{teacher}"] <= errors[f"unfused{teacher}"] + 2**-24
        product = errors[f"linear + unfused{teacher}"]  # most of it is that of the float32 products
        assert errors[f"fused linear{teacher}"] <= 1.2 * product


def test_a_loss_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    """One that raises when it is imported, one that runs out of memory at once, and one that does
    in its third call."""
    calls = []

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.\nMore lines")

    def fails_later(z, target):
        calls.append(z)
        return fails() if len(calls) > 4 else fused_kl_div(z, target)

    losses = {
        "library": Loss(fused_kl_div, needs="no.such.module"),
        "large": Loss(fails),
        "later": Loss(fails_later),
        "fused": Loss(fused_kl_div),
    }
    monkeypatch.setattr(benchmark, "skip_reason", lambda *_: "")
    *failed, fused = benchmark.measure(SIZE, 1e9, losses, 0.0)
    assert failed[0].skip_reason == "ModuleNotFoundError: No module named 'no'"
    for row in failed[1:]:
        assert row.skip_reason.endswith("CUDA out of memory. Tried to allocate 99 GiB.")
        assert row.gb_per_s is None
    assert not fused.skip_reason
    milliseconds = statistics.median(fused.fwd_bwd)
    assert fused.gb_per_s == pytest.approx(3 * 2 * 203 * 4 / milliseconds / 1e6)
    assert fused.of_copy == pytest.approx(fused.gb_per_s)  # of a copy at 1 GB/s


def test_the_triton_paths_run_in_the_benchmark(monkeypatch):
    """As on CUDA, where they are the default."""
    losses = {
        "fused": Loss(partial(fused_kl_div, impl="triton")),
        "simple": LOSSES["fused, simple kernels"],
        "teacher": Loss(partial(fused_kl_div, impl="triton"), "teacher"),
        "in place": Loss(
            partial(fused_kl_div, inplace_backward=True, impl="triton"), in_place=True
        ),
        "fused linear": Loss(partial(fused_linear_kl_div, impl="triton"), head=True),
    }
    monkeypatch.setattr(benchmark, "skip_reason", lambda *_: "")  # the simple kernels need CUDA
    for row in benchmark.measure(SIZE, 1e9, losses, 0.0):
        assert row.error < 1e-5


def kl_with_head(h, w, p):
    return F.kl_div(F.log_softmax(F.linear(h, w), -1), p, reduction="batchmean")


def kl_of_two_heads(h, target_h, w, target_w):
    return kl_with_head(h, w, F.linear(target_h, target_w).softmax(-1))


def jsd(jsd_beta):
    assert jsd_beta == 0
    return lambda h, w, target_h, target_w, labels: kl_of_two_heads(h, target_h, w, target_w)


LIBRARIES = {  # what each module of another library offers, in PyTorch
    "Liger log_softmax + KL": {"LigerKLDIVLoss": torch.nn.KLDivLoss},
    "Liger fused linear KL": {"LigerFusedLinearKLDivLoss": lambda: kl_with_head},
    "flash-linear-attention, teacher": {"fused_kl_div_loss": kl_of_two_heads},
    "Liger fused linear JSD, teacher": {"LigerFusedLinearJSD": jsd},
    "flash-attention cross entropy": {
        "cross_entropy_loss": lambda z, y: (F.cross_entropy(z, y, reduction="none"), None)
    },
    "unsloth cross entropy": {
        "fast_cross_entropy_loss": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    },
}


def test_losses_of_other_libraries_are_called_as_they_are_written(monkeypatch):
    """Each with a stand-in for its module: the gradient is that of the target that it takes."""
    size = SIZE._replace(rows=3)
    assert {n for n, loss in LOSSES.items() if loss.needs not in ("", "triton")} == set(LIBRARIES)
    for name, contents in LIBRARIES.items():
        loss = LOSSES[name]
        monkeypatch.setitem(sys.modules, loss.needs, SimpleNamespace(**contents))
        target = make_target(size, loss.target, loss.head)
        case = Case(loss, make_inputs(size, loss.head), target)
        case.prepare()
        case.fwd_bwd()
        assert case.error() < 1e-5
        assert skip_reason(name, loss, torch.device("cuda")) == ""
        assert skip_reason(name, loss, torch.device("cpu")) == "needs CUDA"


def test_the_host_has_a_column_where_it_was_timed():
    """On CUDA alone; its median, and half the interquartile range."""
    row = benchmark.Row("fused", 8, 203, forward=[1.0, 2.0], fwd_bwd=[3.0, 4.0])
    assert "host ms" not in benchmark.format_table([row])
    row.host = [0.4, 0.5]
    head, line = benchmark.format_table([row]).splitlines()
    assert line[head.index("host ms") :].startswith("0.45 +- 0.075")


@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("77", "77")])
def test_threads_of_the_command_spin_briefly_unless_the_user_says_otherwise(given, expected):
    """libgomp prints the value that it has read, once for each time that it was loaded."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": given} if given else {})
    command = [sys.executable, "-m", "kernels.benchmark", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "--rows" in result.stdout
    values = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    if not values:
        pytest.skip("this build of PyTorch has another OpenMP")
    assert values[-1] == expected


def test_the_library_leaves_the_environment_alone():
    """Only the command sets it."""
    script = (
        "import os; old = {**os.environ}; import kernels, model, weights; assert old == os.environ"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_what_cannot_be_measured_ends_in_one_line():
    """Before anything is measured: a device that is not there, no rows."""
    for arguments, message in (
        (["--device", "cuda:77"], "--device cuda:77: got"),
        (["--device", "abacus"], "--device abacus: expected cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device mps: expected cpu, cuda or cuda:N"),
        (["--rows", "0"], "--rows, --vocab, --width: expected at least 1"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            benchmark.main(arguments)


def test_the_predictions_are_bytes_over_bandwidth():
    """docs/measurements.md: 3 N V elements, 5 toward a teacher, at 4,096 rows, in 4 and 2 bytes."""
    text = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| ([\d.]+) TB/s \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for bandwidth, cells in rows:
        shown = [float(cell.removesuffix(" ms")) for cell in cells.split(" | ")]
        sizes = [passes * 4096 * 50257 * size for passes in (3, 5) for size in (4, 2)]
        assert shown == pytest.approx([s / float(bandwidth) / 1e9 for s in sizes], abs=0.005)
