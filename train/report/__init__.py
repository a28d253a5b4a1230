"""Report finished or interrupted runs: report.html, two figures as PNG, the table as CSV.

The page stands alone: figures are embedded, nothing is fetched, no script runs. Each number in its
sentences is computed from the runs' logs.
"""

import csv
import io
import math
import shlex
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path

from train.report.runs import MODEL, Run, main_run, read_runs
from train.report.texts import Moment, finding, moments, percent, pieces, plain, visible

# The columns of the table; a number is written to table.csv in full, elsewhere by its function.
Row = dict[str, str | float]
COLUMNS: dict[str, Callable[..., str]] = {
    "run": str, "step": "{:,}".format, "asked": percent, "R": percent, "R error": percent,
    "limit R": percent, "perplexity": plain, "limit perplexity": plain,
    "KL to start": "{:.3f}".format, "limit KL": "{:.3f}".format, "distinct-2": "{:.3f}".format,
    "passage perplexity": plain, "text": str,
}  # fmt: skip


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html, its figures and table.csv into `out`; return their paths.

    Raises ValueError for a folder that is not a run, and if `out` cannot be written.
    """
    from train.report.figures import CURVES, DARK, LIGHT, draw  # here, as it takes a second
    from weights.checkpoint import atomic_write  # likewise

    runs = read_runs(folders)
    rows = _rows(runs)
    writer = csv.DictWriter(table := io.StringIO(), COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in rows)
    files = {
        "frontier.png": draw(["frontier", "texts"], runs, LIGHT, "png"),
        "frontier-dark.png": draw(["frontier", "texts"], runs, DARK, "png"),
        "curves.png": draw([*CURVES], runs, LIGHT, "png"),
        "table.csv": table.getvalue().encode(),
        "report.html": _page(runs, rows).encode(),  # last, as the paths are printed in this order
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        again = f"python -m train.report {shlex.join(map(str, folders))} --out FOLDER"
        raise ValueError(f"cannot write the report: {error}; write it elsewhere: {again}") from error
    return [out / name for name in files]


def summary(folders: Sequence[Path]) -> str:
    """Return for a terminal the table, a text before and after, and what to run next."""
    runs = read_runs(folders)
    names = ["run", "asked", "R", "limit R", "perplexity", "limit perplexity", "KL to start",
             "distinct-2"]  # fmt: skip
    rows = _rows(runs)
    cells = [names, *([visible(_shown(row, name)) for name in names] for _, row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["", *("  ".join(map(str.rjust, row, widths)) for row in cells), "", finding(runs)]
    best = main_run(runs)
    for moment, row in rows:
        if moment is rows[0][0] or (moment.run is best and moment.step > 0):
            lines += ["", visible(f"{moment.title}: {row['text']}")]
    if (best.folder / MODEL).exists():
        command = f"python -m train.sample --model {shlex.quote(str(best.folder))}"
        lines += ["", "Sample more text:", visible(f"    {command}")]
    return "\n".join(lines)


def _rows(runs: Sequence[Run]) -> list[tuple[Moment, Row]]:
    """Return a row of the table for each moment, without what was not measured."""
    rows = []
    for moment in moments(runs):
        run, measured = moment.run, moment.evaluation
        row: dict[str, str | float | None] = {
            "run": moment.label, "step": moment.step,
            "R": measured.r, "R error": measured.r_error,
            "perplexity": measured.sample_perplexity, "KL to start": measured.kl_to_start,
            "distinct-2": measured.distinct_2, "passage perplexity": measured.passage_perplexity,
        }  # fmt: skip
        if moment.step > 0 and run.share is not None:
            row["asked"] = run.share
            if run.limit:
                row |= {"limit R": run.limit.r, "limit perplexity": run.limit.sample_perplexity,
                        "limit KL": run.limit.kl_to_start}  # fmt: skip
        for ids in [*moment.texts.values()][:1]:
            row["text"] = "".join(piece.text for piece in pieces(ids, run.targets))
        rows.append((moment, {name: value for name, value in row.items() if value == value}))
    return rows


def _shown(row: Row, name: str) -> str:
    """Write a cell of the table: R with its error; empty where the row does not have it."""
    if name == "R":
        return percent(row["R"], row.get("R error", math.nan))
    return COLUMNS[name](row[name]) if name in row else ""


def _page(runs: Sequence[Run], rows: Sequence[tuple[Moment, Row]]) -> str:
    from jinja2 import StrictUndefined, Template
    from markupsafe import Markup

    from train.report.figures import CURVES, DARK, LIGHT, colours, draw

    template = Template(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,  # the model can write any text, markup included
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    drawn = {name: [b64encode(draw([name], runs, theme, "svg")).decode()
                    for theme in (LIGHT, DARK)] for name in ("frontier", *CURVES)}  # fmt: skip
    settings = []
    for run in runs:
        ran = {"folder": run.folder, "updates": len(run.steps), "seconds": f"{run.seconds:,.1f}"}
        settings.append(ran | run.about | run.about.get("versions", {}) | run.about["options"])
    names = dict.fromkeys(name for column in settings for name in column)
    return template.render(
        runs=runs, rows=rows, finding=finding(runs), figures=drawn, themes=(LIGHT, DARK),
        colours=[colours(runs, theme) for theme in (LIGHT, DARK)],
        columns=[name for name in COLUMNS if name not in ("R error", "text")],
        settings={name: [column.get(name) for column in settings] for name in names
                  if name not in ("options", "versions", "target_token_ids")},
        prompts=list(dict.fromkeys(p for moment, _ in rows for p in moment.texts)),
        shown=_shown, pieces=pieces,
    )  # fmt: skip
