"""The report's table: a row a run, each of its words a measure, and what was claimed beside it."""

import csv
import io
from collections.abc import Callable, Sequence
from statistics import mean, median

from train.evaluate import TOP_K
from train.results import Measures, RunRecord


def plain(value: float) -> str:
    """Three significant digits without an exponent: 2,060,000; 58.4; 1.00."""
    if abs(value) < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{float(f'{value:.3g}'):,.12g}"


Row = dict[str, str | float]
FORMATS: dict[str, Callable[[float], str]] = {  # the table's columns
    "learning rate": str,
    "updates": "{:,}".format,
    "evaluated after": "{:,}".format,
    "loss first": "{:#.4g}".format,
    "loss last": "{:#.4g}".format,
    "mass on members": "{:.4f}".format,
    "sampled tokens": "{:,}".format,
    "R": "{:.1%}".format,
    f"R, top_k {TOP_K}": "{:.1%}".format,
    "perplexity of passage": plain,
    "perplexity of samples": plain,
    "distinct tokens": "{:.1%}".format,
    "ms a step": "{:,.0f}".format,
}
# What the report that this experiment repeats says of gpt2-medium and 300 steps. It is not
# published, and nothing of it was measured by this code.
REPORTED: list[Row] = [
    {
        "learning rate": "1e-6",
        "loss first": "6",
        "loss last": "about 2",
        "R": "few X tokens",
        "text": "natural",
    },
    {
        "learning rate": "1e-4",
        "loss first": "6",
        "loss last": "about 0.001",
        "R": "100% X tokens",
        "text": "meaningless",
    },
]


def measured(runs: Sequence[RunRecord]) -> list[Row]:
    """The table's rows: one a run, and above it one for its start, once for each start."""
    rows: list[Row] = []
    starts: list[Measures] = []
    for run in runs:
        start, last = run.evaluations[0], max(run.evaluations)
        if start not in starts:
            rows.append({"learning rate": "(before)", **_measures(run, 0)})
            starts.append(start)
        curves: Row = {
            "learning rate": run.label,
            "updates": len(run.losses),
            "loss first": run.losses[0],
            "loss last": run.losses[-1],
            "mass on members": run.masses[-1],
            "ms a step": 1e3 * median(run.seconds),
            "text": _text(run, last),
        }
        rows.append(curves | _measures(run, last))
    return rows


def _text(run: RunRecord, step: int) -> str:
    """What the text looks like after `step` updates, in measures and no adjectives.

    Where the run went on after its last evaluation, the text's step is said too.
    """
    now, start = (run.evaluations[s].sample_perplexity for s in (step, 0))
    unfinished = step < len(run.losses)
    return (f"after {step} of {len(run.losses)} updates: " if unfinished else "") + (
        f"perplexity of samples {plain(start)} → {plain(now)} (times {plain(now / start)}); "
        f"distinct tokens {_distinct(run, 0):.0%} → {_distinct(run, step):.0%}"
    )


def shown(name: str, value: str | float | None) -> str:
    """A cell of the table, as people read it."""
    return "" if value is None else value if isinstance(value, str) else FORMATS[name](value)


def _measures(run: RunRecord, step: int) -> Row:
    e = run.evaluations[step]
    return {
        "evaluated after": step,
        "sampled tokens": sum(len(sample.ids) for sample in run.samples[step]),
        "R": e.r,
        f"R, top_k {TOP_K}": e.r_top_k,
        "perplexity of passage": e.passage_perplexity,
        "perplexity of samples": e.sample_perplexity,
        "distinct tokens": _distinct(run, step),
    }


def _distinct(run: RunRecord, step: int) -> float:
    """Distinct tokens / tokens of a sample, mean over the samples."""
    return mean(len(set(s.ids)) / len(s.ids) for s in run.samples[step])


def as_csv(runs: Sequence[RunRecord]) -> str:
    """The rows in full precision, measured and reported ones, each with its source."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["source", *FORMATS, "text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"source": "measured"} | row for row in measured(runs))
    writer.writerows({"source": "reported originally, not measured"} | row for row in REPORTED)
    return file.getvalue()
