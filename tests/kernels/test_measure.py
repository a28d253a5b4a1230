"""Times and peak memory, as the benchmarks measure them."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from kernels import fused_kl_div, fused_linear_kl_div, measure
from tests.kernels.kl_cases import DEVICE, two_level


def test_the_queue_is_filled_before_the_events_and_the_host_is_timed_apart(monkeypatch):
    """On CUDA the device sleeps while the host launches: its time is between the events alone."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, other):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    device, host = measure.milliseconds(lambda: calls.append("step"), torch.device("cuda:1"))
    assert calls == ["synchronize", "sleep", "event", "step", "event", "synchronize"]
    assert device == 7.0
    assert 0 < host < 7.0


def in_a_process_of_its_own(function, *arguments):
    """Where no other test's threads take memory meanwhile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peaks_of_two_tensors():
    """Two tensors of 40 MB, at the same time and one after the other, MB; -1 where it cannot
    be measured. The larger peak first: it must not stand for the other."""

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
    """Fused, fused linear in chunks of 16 rows, fused in place, MB; -1 where it cannot be
    measured. The least of five each: what else the process does only adds."""
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
    and the linear one, in chunks of 16 rows, less than half: it never holds all logits. Another
    8 MB are allowed: 2 MB of scratch, rounding to 2 MB pages, and what malloc keeps."""
    rows, vocab, width, spare = 256, 50257, 16, 8
    sizes = rows, vocab, width
    fused, linear, in_place = in_a_process_of_its_own(peaks_of_the_fused_losses, *sizes)
    if fused < 0:
        pytest.skip("neither CUDA nor Linux")
    buffer = rows * vocab * 4 / 1e6
    assert fused < buffer + spare
    assert linear < buffer / 2
    assert in_place < spare
