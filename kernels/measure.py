"""Timing, memory and tables of the benchmarks, on CUDA and on the CPU."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 cache
SLEEP_CYCLES = 10_000_000  # 5 ms at 2 GHz, several times what a loss takes on the host


def milliseconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """The device's time for a step, and the host's time to launch it.

    On CUDA the device first sleeps while the host fills its queue, so that its time has no gaps in
    which it waits for the host; and the L2 cache is emptied. On the CPU both are the same.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
        torch.cuda.synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(SLEEP_CYCLES)
        events[0].record()
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    if not cuda:
        return host, host
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]), host


def copy_bandwidth(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes per second read and written by copying a tensor over its clone; median of nine."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    clone = source.clone()
    times = [milliseconds(lambda: clone.copy_(source), device)[0] for _ in range(9)]
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
    ctypes.CDLL(None).malloc_trim(0)  # so that freed memory does not hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) * 1024 / 1e6


def _resident(name: str) -> int:
    """kB, from /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))


def format_table(rows: list[dict[str, Any]], forms: dict[str, str]) -> str:
    """Columns of these keys in these forms: of a list the median, and "-" where a row has nothing;
    a key that no row has is left out."""

    def cell(value: Any, form: str) -> str:
        value = statistics.median(value) if isinstance(value, list) else value
        return "-" if value is None else format(value, form)

    keys = [key for key in forms if any(key in row for row in rows)]
    columns = [[key, *(cell(row.get(key), forms[key]) for row in rows)] for key in keys]
    padded = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
