"""What the benchmark found: its rows, as a table and as a figure."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One line of the table; None, or no times, is "not measured", and `why` says why."""

    name: str
    rows: int
    why: str = ""
    forward: list[float] = field(default_factory=list)  # ms, one a repetition
    both: list[float] = field(default_factory=list)
    gb_per_s: float | None = None
    copy_share: float | None = None
    peak_mb: float | None = None
    error: float | None = None


def timing(times: list[float]) -> str:
    """Median and half the distance between the quartiles."""
    if not times:
        return "not measured"
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ± {(high - low) / 2:.1f}"


def format_table(table: list[Row]) -> str:
    """The rows in aligned columns under a head."""

    def cell(value: float | None, form: str) -> str:
        return "not measured" if value is None else format(value, form)

    head = ["rows", "loss", "forward ms", "fwd+bwd ms", "GB/s", "copy", "peak MB", "error"]
    lines = [head] + [
        [
            str(row.rows),
            row.name,
            timing(row.forward),
            timing(row.both) + (f" ({row.why})" if row.why else ""),
            cell(row.gb_per_s, ".1f"),
            cell(row.copy_share, ".0%"),
            cell(row.peak_mb, ".1f"),
            cell(row.error, ".1e"),
        ]
        for row in table
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(table: list[Row], path: Path, title: str) -> None:
    """Time and memory over rows, log axes."""
    from matplotlib.figure import Figure  # here: neither the table nor the kernels need it

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in table if row.both):
        rows = [row for row in table if row.name == name]
        counts = [row.rows for row in rows]
        style = "o--" if "unfused" in name or "Liger" in name else "o-"
        medians = [statistics.median(row.both) for row in rows]
        time_axes.plot(counts, medians, style, label=name)
        memory = [row.peak_mb or float("nan") for row in rows]
        memory_axes.plot(counts, memory, style, label=name)
    for axes, label in ((time_axes, "forward + backward, ms"), (memory_axes, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
