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
    """Where no other test's threads take memory meanwhile. Skips where there is neither CUDA nor
    Linux, so that memory cannot be measured."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peaks = process.submit(function, *arguments).result()
    if None in peaks:
        pytest.skip("neither CUDA nor Linux")
    return peaks


def peaks_of_two_tensors():
    """MB of two tensors of 40 MB, at the same time and one after the other. The larger peak first:
    it must not stand for the other."""

    def one_by_one():
        for _ in range(2):
            torch.ones(10_000_000, device=DEVICE)

    def together():
        return [torch.ones(10_000_000, device=DEVICE) for _ in range(2)]

    return [measure.peak_megabytes(step, torch.device(DEVICE)) for step in (together, one_by_one)]


def test_peak_memory_is_that_of_the_largest_moment():
    """Two tensors of 40 MB: 40 one after the other, 80 at the same time."""
    assert in_a_process_of_its_own(peaks_of_two_tensors) == pytest.approx([80, 40], abs=4)


def peaks_of_the_fused_losses(rows, vocab, width):
    """MB of the fused loss, the linear one in chunks of 16 rows, and the fused one in place. The
    least of five each: what else the process does only adds."""
    target = two_level(vocab)
    shapes = (rows, vocab), (rows, width), (vocab, width)
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    logits, hidden, weight = leaves

    def peak(loss):
        peaks = []
        for _ in range(6):
            for leaf in leaves:
                leaf.grad = None
            peaks.append(measure.peak_megabytes(lambda: loss().backward(), torch.device(DEVICE)))
        return peaks[0] and min(peaks[1:])  # the first one warms up

    return [
        peak(lambda: fused_kl_div(logits, target)),
        peak(lambda: fused_linear_kl_div(hidden, weight, target, chunk_rows=16)),
        peak(lambda: fused_kl_div(logits, target, inplace_backward=True)),
    ]


def test_fused_losses_stay_within_their_memory():
    """256 rows of 50,257 in float32, 51 MB: the fused loss takes one such buffer, in place none,
    and the linear one, in chunks of 16 rows, less than half: it never holds all logits. Another
    8 MB are allowed: 2 MB of scratch, rounding to 2 MB pages, and what malloc keeps."""
    buffer, spare = 256 * 50257 * 4 / 1e6, 8
    fused, linear, in_place = in_a_process_of_its_own(peaks_of_the_fused_losses, 256, 50257, 16)
    assert fused < buffer + spare
    assert linear < buffer / 2
    assert in_place < spare
