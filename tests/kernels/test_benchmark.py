"""The benchmark at small sizes: every path runs, gauges gauge, unmeasured cells say so."""

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from kernels import benchmark, fused_kl_div, fused_linear_kl_div, measure
from tests.kernels.kl_cases import DEVICE, two_level

SIZES = [
    "--rows",
    "3",
    "5",
    "--vocab",
    "1001",
    "--width",
    "16",
    "--seconds",
    "0",
    "--device",
    DEVICE,
]


def test_every_loss_is_measured_or_says_why_not(capsys, tmp_path, monkeypatch):
    """The table, the figure, the JSON line; the compiled row stands in eagerly, to save minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    benchmark._compiled.cache_clear()
    benchmark.main([*SIZES, "--json", "--plot", str(tmp_path / "benchmark.png")])
    benchmark._compiled.cache_clear()
    *lines, last = capsys.readouterr().out.splitlines()
    table = json.loads(last)["table"]
    assert [row["rows"] for row in table] == [3] * 8 + [5] * 8
    for row, line in zip(table, lines[-len(table) :], strict=True):
        assert row["name"] in line
        measured = [row["forward"], row["both"], row["gb_per_s"], row["peak_mb"], row["error"]]
        if row["why"]:
            assert row["name"].startswith("Liger")
            assert not any(measured)
            assert line.count("not measured") == 6
        else:
            assert len(row["forward"]) == len(row["both"]) == 3
            assert row["error"] < 1e-5
            assert "not measured" not in line
            assert re.search(r"\d ± \d", line)
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_the_triton_paths_run_in_the_benchmark():
    """As on CUDA, where they are the default; in the interpreter without one."""
    losses = {
        "fused": lambda z, t: fused_kl_div(z, t, impl="triton"),
        "fused, in place": lambda z, t: fused_kl_div(z, t, inplace_backward=True, impl="triton"),
        "fused linear": lambda h, w, t: fused_linear_kl_div(h, w, t, impl="triton"),
    }
    setting = benchmark.Setting(torch.device(DEVICE), torch.float32, vocab=203, width=8)
    for row in benchmark.measure(2, setting, 1e9, 0.0, losses):
        assert row.error is not None
        assert row.error < 1e-5


def test_a_rival_that_is_missing_says_what_is_missing(monkeypatch):
    """No liger-kernel; then one of its releases that has one of the two losses."""
    setting = benchmark.Setting(torch.device("cuda"), torch.float32, vocab=7, width=8)
    found = set()
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name if name in found else None)
    for name in benchmark.LIGER:
        assert benchmark.why_not(name, setting) == "liger-kernel is not installed"
    found |= {"liger_kernel", "liger_kernel.transformers.kl_div"}
    assert benchmark.why_not("Liger log_softmax + KL", setting) == ""
    assert "has no liger_kernel" in benchmark.why_not("Liger fused linear KL", setting)


def in_a_process_of_its_own(function, *arguments):
    """Where no other test's threads take memory meanwhile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peaks_of_two_tensors():
    """Two tensors of 40 MB, at the same time and one after the other, MB; -1 where there is no
    gauge. The larger peak first: it must not stand for the other."""

    def one_by_one():
        for _ in range(2):
            torch.ones(10_000_000, device=DEVICE)

    def together():
        return [torch.ones(10_000_000, device=DEVICE) for _ in range(2)]

    device = torch.device(DEVICE)
    return [measure.peak_megabytes(step, device) or -1 for step in (together, one_by_one)]


def test_peak_memory_is_that_of_the_largest_moment():
    """Two tensors of 40 MB: 40 one after the other, 80 at the same time."""
    together, one_by_one = in_a_process_of_its_own(peaks_of_two_tensors)
    if one_by_one < 0:
        pytest.skip("neither CUDA nor Linux")
    assert one_by_one == pytest.approx(40, abs=4)
    assert together == pytest.approx(80, abs=4)


def peaks_of_the_fused_losses(rows, vocab, width):
    """Of fused, fused in place and fused linear in chunks of 16 rows, MB; -1 where there
    is no gauge. The least of five each: what else the process does only adds."""
    device, target = torch.device(DEVICE), two_level(vocab)
    logits = torch.randn(rows, vocab, device=DEVICE).requires_grad_()
    hidden = torch.randn(rows, width, device=DEVICE).requires_grad_()
    weight = torch.randn(vocab, width, device=DEVICE).requires_grad_()

    def peak(loss):
        peaks = []
        for _ in range(6):
            logits.grad = hidden.grad = weight.grad = None
            peaks.append(measure.peak_megabytes(lambda: loss().backward(), device) or -1)
        return min(peaks[1:])  # the first one warms up

    return (
        peak(lambda: fused_kl_div(logits, target)),
        peak(lambda: fused_linear_kl_div(hidden, weight, target, chunk_rows=16)),
        peak(lambda: fused_kl_div(logits, target, inplace_backward=True)),
    )


def test_fused_losses_stay_within_their_memory():
    """256 rows of 50,257 in float32, 51 MB: the fused loss takes one such buffer, in place none,
    and the linear one, in chunks of 16 rows, less than half: the logits never are whole. Allowed
    besides are 8 MB: 2 MB of scratch, the rounding to 2 MB pages, what malloc keeps."""
    rows, vocab, width, spare = 256, 50257, 16, 8
    sizes = rows, vocab, width
    fused, linear, in_place = in_a_process_of_its_own(peaks_of_the_fused_losses, *sizes)
    if fused < 0:
        pytest.skip("neither CUDA nor Linux")
    buffer = rows * vocab * 4 / 1e6
    assert fused < buffer + spare
    assert linear < buffer / 2
    assert in_place < spare
