"""The benchmark at small sizes: every path runs, gauges gauge, unmeasured cells say so."""

import json
import re

import pytest
import torch

from kernels import benchmark, fused_kl_div, fused_linear_kl_div, measure
from tests.kl_cases import DEVICE, two_level

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


def test_peak_memory_is_that_of_the_largest_moment():
    """Two tensors of 40 MB, one after the other: 40, and 80 at the same time."""

    def one_by_one():
        for _ in range(2):
            torch.ones(10_000_000, device=DEVICE)

    def together():
        return [torch.ones(10_000_000, device=DEVICE) for _ in range(2)]

    device = torch.device(DEVICE)
    if measure.peak_megabytes(lambda: None, device) is None:
        pytest.skip("neither CUDA nor Linux")
    assert measure.peak_megabytes(one_by_one, device) == pytest.approx(40, abs=4)
    assert measure.peak_megabytes(together, device) == pytest.approx(80, abs=4)


def test_fused_losses_stay_within_their_memory():
    """128 rows of 50,257 in float32, 26 MB: the fused loss takes one such buffer, in place none,
    the linear one a chunk of an eighth and its gradients. Allowed beside them are 8 MB: 2 MB of
    scratch, the rounding to 2 MB pages, what BLAS packs and what malloc keeps. The least of five
    counts: what else the process takes or gives back meanwhile only adds to it."""
    device, rows, vocab, width, spare = torch.device(DEVICE), 128, 50257, 16, 8
    buffer = rows * vocab * 4 / 1e6
    target = two_level(vocab)
    logits = torch.randn(rows, vocab, device=DEVICE).requires_grad_()
    hidden = torch.randn(rows, width, device=DEVICE).requires_grad_()
    weight = torch.randn(vocab, width, device=DEVICE).requires_grad_()

    def peak(loss):
        def step():
            logits.grad = hidden.grad = weight.grad = None
            loss().backward()

        step()
        peaks = [measure.peak_megabytes(step, device) for _ in range(5)]
        return None if None in peaks else min(peaks)

    if peak(lambda: fused_kl_div(logits, target)) is None:
        pytest.skip("neither CUDA nor Linux")
    assert peak(lambda: fused_kl_div(logits, target)) < buffer + spare
    gradients = vocab * width * 4 / 1e6
    linear = peak(lambda: fused_linear_kl_div(hidden, weight, target, chunk_rows=16))
    assert linear < buffer / 8 + 2 * gradients + spare
    in_place = peak(lambda: fused_kl_div(logits, target, inplace_backward=True))
    assert in_place < spare
