"""Report finished or interrupted runs: report.html, its figures as PNG, its table as CSV.

The page stands alone: figures are embedded, nothing is fetched, no script runs. Each word about a
run follows from a measurement; what the original report claimed stands in rows of its own.
"""

import os
import shlex
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train.checkpoint import replacing
from train.report.runs import Run, best, read_runs
from train.report.samples import count, moments, opening, pieces, typical
from train.report.table import FORMATS, as_csv, measured, shown
from weights.layout import printable


def write_report(run_folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the figures, table.csv and report.html into `out`; return their paths.

    Args:
        run_folders: each a run's folder or a folder of them, as train.xfactor writes.

    Raises:
        ValueError: a folder that is not a run; `out` cannot be written. The runs stay as they are.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, inherited, makes the import fail
    from train.report import figures  # here: half a second, and only for files

    runs = read_runs(run_folders)
    files = {
        "tradeoff.png": figures.draw(["tradeoff", "texts"], runs, figures.LIGHT, "png"),
        "tradeoff-dark.png": figures.draw(["tradeoff", "texts"], runs, figures.DARK, "png"),
        "curves.png": figures.draw(["loss", "probability"], runs, figures.LIGHT, "png"),
        "evaluations.png": figures.draw(["r", "perplexity"], runs, figures.LIGHT, "png"),
        "table.csv": as_csv(runs).encode("utf-8", "backslashreplace"),
        "report.html": _page(runs).encode("utf-8", "backslashreplace"),  # its path is printed last
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        folders = shlex.join(map(str, run_folders))
        message = (
            f"cannot write the report to {out}: {error}. The runs are complete; report them "
            f"elsewhere: python -m train.report {folders} --out FOLDER"
        )
        raise ValueError(printable(message)) from error
    return [out / name for name in files]


def summary(run_folders: Sequence[Path]) -> str:
    """Return for a terminal the table, text before and after each run, and what to run next.

    Raises ValueError for folders that are not runs.
    """
    runs = read_runs(run_folders)
    names = ("run", "kind", "loss last", "R", "R error", "R predicted", "perplexity of samples")
    rows = [(moment, measured(*moment)) for moment in moments(runs)]
    cells = [names, *([shown(row, name) for name in names] for _, row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["", *("  ".join(map(str.rjust, row, widths)) for row in cells), ""]
    lines += ["R: share of target tokens in sampled text, with its binomial error.",
              "Perplexity: of the samples, under the model before fine-tuning."]  # fmt: skip
    for (run, evaluation), row in rows:
        sample = typical(run, evaluation)[0]
        text = "".join(piece.text for piece in pieces(sample.ids, run.target_token_ids))
        lines += ["", f"{row['run']}: {printable(sample.prompt)}{text}"]
    folder = printable(shlex.quote(str(best(runs).folder)))
    return "\n".join([*lines, "", "Sample it:", f"    python -m train.sample --model {folder}"])


def _page(runs: Sequence[Run]) -> str:
    from train.report import figures

    themes = (figures.LIGHT, figures.DARK)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # the model can write any text, markup included
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {name: [b64encode(figures.draw([name], runs, theme, "svg")).decode()
                    for theme in themes] for name in ("tradeoff", *figures.CURVES)}  # fmt: skip
    seconds = [sum(step.seconds for step in run.steps) for run in runs]
    settings = [
        run.about | {"folder": run.folder, "seconds": f"{total:,.1f}"}
        | run.versions | run.about["options"]
        for run, total in zip(runs, seconds, strict=True)
    ]  # fmt: skip
    names = dict.fromkeys(name for column in settings for name in column)
    return environment.get_template("report.html.jinja").render(
        runs=runs, best=best(runs), themes=themes, columns=list(FORMATS)[:-1],
        rows=[(moment, measured(*moment)) for moment in moments(runs)],
        figures=drawn, colours=[figures.colours(runs, theme) for theme in themes],
        settings={name: [column.get(name) for column in settings] for name in names
                  if name not in ("options", "versions", "target_token_ids")},
        shown=shown, typical=typical, pieces=pieces, opening=opening, count=count,
    )  # fmt: skip
