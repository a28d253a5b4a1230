"""Report finished or interrupted runs: report.html, its figures as PNG, its table as CSV.

The page stands alone: figures are embedded, nothing is fetched, no script runs. Each word about a
run follows from a measurement; what the original report claimed is marked as not measured.
"""

import csv
import io
import os
import shlex
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from jinja2 import StrictUndefined, Template

from train.checkpoint import MODEL, replacing
from train.report.runs import Evaluation, Run, best, read_runs, scientific
from train.report.samples import count, moments, opening, pieces, typical
from weights.layout import printable

Row = dict[str, str | float | None]
Rows = list[tuple[Run, Evaluation, Row]]


def plain(value: float) -> str:
    """Write three significant digits: 1.00, 58.4, 206,000; from a million on 3.86e8."""
    if value < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{float(f'{value:.3g}'):,.0f}" if value < 999_500 else scientific(value, 2)


FORMATS: dict[str, Callable[..., str]] = {  # the columns of the table
    "run": str, "kind": str, "updates": "{:,}".format, "evaluated after": "{:,}".format,
    "loss first": "{:#.4g}".format, "loss last": "{:#.4g}".format,
    "target probability": "{:.4f}".format, "R": "{:.1%}".format, "R error": "{:.1%}".format,
    "R predicted": "{:.1%}".format, "R, top-k": "{:.1%}".format, "sampled tokens": "{:,}".format,
    "perplexity of samples": plain, "perplexity of passage": plain,
    "ms per step": "{:,.0f}".format, "text": str,
}  # fmt: skip


def write_report(run_folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the figures, table.csv and report.html of runs into `out`; return their paths.

    Raises ValueError for a folder that is not a run, and if `out` cannot be written.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, inherited, makes the import fail
    from train.report.figures import DARK, LIGHT, draw  # here: half a second, and only for files

    runs = read_runs(run_folders)
    rows = _rows(runs)
    writer = csv.DictWriter(table := io.StringIO(), FORMATS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for *_, row in rows)  # in full precision
    files = {
        "tradeoff.png": draw(["tradeoff", "texts"], runs, LIGHT, "png"),
        "tradeoff-dark.png": draw(["tradeoff", "texts"], runs, DARK, "png"),
        "curves.png": draw(["loss", "probability"], runs, LIGHT, "png"),
        "evaluations.png": draw(["r", "perplexity"], runs, LIGHT, "png"),
        "table.csv": table.getvalue().encode("utf-8", "backslashreplace"),
        # Last, as the paths are printed in this order.
        "report.html": _page(runs, rows).encode("utf-8", "backslashreplace"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(out / name, staging=".xfactor-report.tmp") as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        again = f"python -m train.report {shlex.join(map(str, run_folders))} --out FOLDER"
        message = f"{error}. The runs are unchanged; report them elsewhere: {again}"
        raise ValueError(printable(f"cannot write the report to {out}: {message}")) from error
    return [out / name for name in files]


def summary(run_folders: Sequence[Path]) -> str:
    """Return for a terminal the table, text before and after each run, and what to run next."""
    runs = read_runs(run_folders)
    names = ("run", "kind", "loss last", "R", "R error", "R predicted", "perplexity of samples")
    rows = _rows(runs)
    cells = [names, *([_shown(row, name) for name in names] for *_, row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["", *("  ".join(map(str.rjust, row, widths)) for row in cells), ""]
    lines += ["R: share of target tokens in sampled text, with its binomial error.",
              "Perplexity: of the samples, under the model before fine-tuning."]  # fmt: skip
    for run, evaluation, row in rows:
        sample = typical(run, evaluation)[0]
        text = "".join(piece.text for piece in pieces(sample.ids, run.target_token_ids))
        lines += ["", f"{row['run']}: {printable(sample.prompt)}{text}"]
    if whole := [run for run in runs if (run.folder / MODEL).exists()]:  # none that diverged
        folder = printable(shlex.quote(str(best(whole).folder)))
        lines += ["", "Sample it:", f"    python -m train.sample --model {folder}"]
    return "\n".join(lines)


def _rows(runs: Sequence[Run]) -> Rows:
    """Return a row of the table per run, ahead of it one for the model before fine-tuning."""
    rows = []
    for run, evaluation in moments(runs):
        row: Row = {
            "run": "before", "evaluated after": 0,
            "R": evaluation.r, "R error": evaluation.r_error(), "R, top-k": evaluation.r_top_k,
            "sampled tokens": evaluation.tokens(),
            "perplexity of samples": evaluation.sample_perplexity,
            "perplexity of passage": evaluation.passage_perplexity,
            "text": "".join(p.text for p in opening(typical(run, evaluation)[0], run)),
        }  # fmt: skip
        if evaluation is not run.before:
            row |= {
                "run": run.label, "kind": run.kind, "updates": len(run.steps),
                "evaluated after": max(run.evaluations),
                "loss first": run.steps[0].loss, "loss last": run.steps[-1].loss,
                "target probability": run.steps[-1].target_probability,
                "R predicted": run.predicted_r,
                "ms per step": 1e3 * median(step.seconds for step in run.steps),
            }  # fmt: skip
        rows.append((run, evaluation, row))
    return rows


def _shown(row: Row, name: str) -> str:
    """Write a cell of the table; empty where the row does not have it."""
    value = row.get(name)
    return "" if value is None else FORMATS[name](value)


def _page(runs: Sequence[Run], rows: Rows) -> str:
    from train.report.figures import CURVES, DARK, LIGHT, colours, draw

    template = Template(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,  # the model can write any text, markup included
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    drawn = {name: [b64encode(draw([name], runs, theme, "svg")).decode()
                    for theme in (LIGHT, DARK)] for name in ("tradeoff", *CURVES)}  # fmt: skip
    settings = []
    for run in runs:
        where = {"folder": run.folder, "seconds": f"{sum(s.seconds for s in run.steps):,.1f}"}
        settings.append(run.about | where | run.versions | run.about["options"])
    names = dict.fromkeys(name for column in settings for name in column)
    return template.render(
        runs=runs, best=best(runs), themes=(LIGHT, DARK), columns=list(FORMATS)[:-1],
        rows=rows, figures=drawn, colours=[colours(runs, theme) for theme in (LIGHT, DARK)],
        settings={name: [column.get(name) for column in settings] for name in names
                  if name not in ("options", "versions", "target_token_ids")},
        shown=_shown, typical=typical, pieces=pieces, opening=opening, count=count,
    )  # fmt: skip
