"""The benchmark's rows, as a table and as a figure."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INK, FAINT, GRID = "#24292f", "#5d6670", "#e4e7ea"


@dataclass
class Row:
    """One loss at one number of rows; empty, with a reason, where it was not measured."""

    name: str
    rows: int
    skip_reason: str = ""
    forward: list[float] = field(default_factory=list)  # ms, one per repetition
    fwd_bwd: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # of forward + backward, on CUDA
    roofline: float | None = None
    peak_mb: float | None = None
    error: float | None = None


def timing(times: list[float]) -> str:
    """Median and half the interquartile range."""
    if not times:
        return "-"
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.4g} +- {(high - low) / 2:.2g}"


def format_table(table: list[Row]) -> str:
    """The rows in aligned columns under a head; without the host's times if there are none."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    columns = {
        "rows": [str(row.rows) for row in table],
        "loss": [row.name for row in table],
        "forward ms": [timing(row.forward) for row in table],
        "fwd+bwd ms": [timing(row.fwd_bwd) for row in table],
        "host ms": [timing(row.host) for row in table] if any(r.host for r in table) else [],
        "roofline": [cell(row.roofline, ".0%") for row in table],
        "peak MB": [cell(row.peak_mb, ".1f") for row in table],
        "error": [cell(row.error, ".1e") for row in table],
        "": [row.skip_reason for row in table],
    }
    return aligned({head: cells for head, cells in columns.items() if cells})


def aligned(columns: dict[str, list[str]]) -> str:
    """Lay the columns out side by side under their heads."""
    whole = [[head, *cells] for head, cells in columns.items()]
    padded = [[text.ljust(max(map(len, column))) for text in column] for column in whole]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def plot(table: list[Row], path: Path, title: str) -> None:
    """Time and memory of each loss, a dot for each number of rows; the fused losses in blue."""
    import matplotlib  # here: neither the table nor the kernels need it
    from matplotlib.figure import Figure

    measured = [row for row in table if row.fwd_bwd]
    names = list(dict.fromkeys(row.name for row in measured))[::-1]
    counts = sorted({row.rows for row in measured})
    sizes = {f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")}
    style: dict[Any, Any] = sizes | {  # Any: matplotlib types the keys as 300 literals
        "axes.axisbelow": True, "axes.edgecolor": FAINT, "axes.grid": True,
        "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
        "axes.titleweight": "bold", "font.size": 11, "grid.color": GRID, "text.color": INK,
        "xtick.color": FAINT, "ytick.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 1.8 + 0.33 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for row in measured:
            shade = 0.45 + 0.5 * counts.index(row.rows) / max(1, len(counts) - 1)
            colours = "Blues" if row.name.startswith("fused") else "Oranges"
            colour = matplotlib.colormaps[colours](shade)
            values = statistics.median(row.fwd_bwd), row.peak_mb or float("nan")
            for axes, value in zip(panels, values, strict=True):
                axes.plot(value, names.index(row.name), "o", color=colour, markersize=8)
        for axes, head in zip(panels, ("Forward + backward, ms", "Peak memory, MB"), strict=True):
            axes.set_title(head)
            axes.set(xscale="log", yticks=range(len(names)), yticklabels=names)
            axes.xaxis.set_minor_formatter("")  # its labels overlap below two decades
        figure.suptitle(f"{title}\nlight to dark: {', '.join(f'{n:,}' for n in counts)} rows",
                        x=0.01, ha="left", fontsize=10, color=FAINT)  # fmt: skip
        figure.savefig(path, dpi=200)
