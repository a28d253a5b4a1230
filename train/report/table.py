"""Tabulate the runs: one row per run, ahead of it one for the model before fine-tuning."""

import csv
import io
from collections.abc import Callable, Sequence
from statistics import median

from train.report.runs import Evaluation, Run, scientific
from train.report.samples import moments, opening, typical

Row = dict[str, str | float | None]


def plain(value: float) -> str:
    """Write three significant digits: 1.00, 58.4, 206,000; from a million on 3.86e8."""
    if value < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{float(f'{value:.3g}'):,.0f}" if value < 999_500 else scientific(value, 2)


FORMATS: dict[str, Callable[..., str]] = {  # the columns
    "run": str, "kind": str, "updates": "{:,}".format, "evaluated after": "{:,}".format,
    "loss first": "{:#.4g}".format, "loss last": "{:#.4g}".format,
    "target probability": "{:.4f}".format, "R": "{:.1%}".format, "R error": "{:.1%}".format,
    "R predicted": "{:.1%}".format, "R, top-k": "{:.1%}".format, "sampled tokens": "{:,}".format,
    "perplexity of samples": plain, "perplexity of passage": plain,
    "ms per step": "{:,.0f}".format, "text": str,
}  # fmt: skip


def measured(run: Run, evaluation: Evaluation) -> Row:
    """Return the table's row for a run, or for the model before fine-tuning."""
    sample = typical(run, evaluation)[0]
    row: Row = {
        "R": evaluation.r, "R error": evaluation.r_error(), "R, top-k": evaluation.r_top_k,
        "sampled tokens": evaluation.tokens(),
        "perplexity of samples": evaluation.sample_perplexity,
        "perplexity of passage": evaluation.passage_perplexity,
        "text": "".join(piece.text for piece in opening(sample, run)),
    }  # fmt: skip
    if evaluation is run.before:
        return row | {"run": "before", "evaluated after": 0}
    return row | {
        "run": run.label, "kind": run.kind, "updates": len(run.steps),
        "evaluated after": max(run.evaluations),
        "loss first": run.steps[0].loss, "loss last": run.steps[-1].loss,
        "target probability": run.steps[-1].target_probability, "R predicted": run.predicted_r,
        "ms per step": 1e3 * median(step.seconds for step in run.steps),
    }  # fmt: skip


def shown(row: Row, name: str) -> str:
    """Write a cell of the table; empty where the row does not have it."""
    value = row.get(name)
    return "" if value is None else value if isinstance(value, str) else FORMATS[name](value)


def as_csv(runs: Sequence[Run]) -> str:
    """Write the rows in full precision."""
    writer = csv.DictWriter(file := io.StringIO(), FORMATS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured(*moment) for moment in moments(runs))
    return file.getvalue()
