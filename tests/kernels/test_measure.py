"""Times and peak memory, as the benchmarks measure them."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from kernels import fused_kl_div, fused_linear_kl_div, measure
from tests.kernels.kl_cases import DEVICE, two_level

ROWS, VOCAB, WIDTH = 256, 50257, 16


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


@pytest.fixture(scope="module")
def peaks():
    """Measured in a process of its own, where no other test's threads take memory meanwhile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peaks = process.submit(measured_peaks).result()
    if None in peaks.values():
        pytest.skip("neither CUDA nor Linux")
    return peaks


def test_peak_memory_is_that_of_the_largest_moment(peaks):
    """Two tensors of 40 MB: 40 one after the other, 80 at the same time."""
    assert peaks["one by one"] == pytest.approx(40, abs=4)
    assert peaks["together"] == pytest.approx(80, abs=4)


def test_fused_losses_stay_within_their_memory(peaks):
    """256 rows of 50,257 in float32, 51 MB: the fused loss takes one such buffer, in place none,
    and the linear one, in chunks of 16 rows, less than half: it never holds all logits. Another
    8 MB are allowed: 2 MB of scratch, rounding to 2 MB pages, and what malloc keeps."""
    buffer, spare = ROWS * VOCAB * 4 / 1e6, 8
    assert peaks["fused"] < buffer + spare
    assert peaks["linear"] < buffer / 2
    assert peaks["in place"] < spare
