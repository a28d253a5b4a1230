"""The benchmark's rows, as a table."""

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """One loss at one size; with a reason where it was not measured."""

    name: str
    rows: int
    vocab: int
    skip_reason: str = ""
    forward: list[float] = field(default_factory=list)  # ms, one per repetition
    fwd_bwd: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # of forward + backward, on CUDA
    gb_per_s: float | None = None
    of_copy: float | None = None
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
        "loss": [row.name for row in table],
        "forward ms": [timing(row.forward) for row in table],
        "fwd+bwd ms": [timing(row.fwd_bwd) for row in table],
        "host ms": [timing(row.host) for row in table] if any(r.host for r in table) else [],
        "GB/s": [cell(row.gb_per_s, ".4g") for row in table],
        "of copy": [cell(row.of_copy, ".0%") for row in table],
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
