"""Clocks and gauges of the benchmark: time, copy bandwidth, peak memory, on CUDA and on the CPU."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 cache


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """One run of the step; on CUDA by events, with the L2 cache emptied before."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1])


def copy_bandwidth(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes read and written a second by copying a tensor over its clone; median of nine."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    clone = source.clone()
    times = [milliseconds(lambda: clone.copy_(source), device) for _ in range(9)]
    return 2 * size / (statistics.median(times) / 1e3)


def peak_megabytes(step: Callable[[], object], device: torch.device) -> float | None:
    """The most memory in use at a time during the step, above what was in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) * 1024 / 1e6


def _resident(name: str) -> int:
    """kB, from /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))
