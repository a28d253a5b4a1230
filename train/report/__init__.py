"""Report finished or interrupted runs: report.html, its figures as PNG, its table as CSV.

The page stands alone: figures are embedded, nothing is fetched, no script runs. Each number in a
sentence is computed from the runs' logs.
"""

import csv
import io
import shlex
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from train.report.runs import Run, read_runs
from train.report.texts import cells, finding, pieces, shown, visible


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html, its figures and table.csv into `out`; return their paths.

    Raises ValueError for a folder that is not a run, and if `out` cannot be written.
    """
    from train.report.figures import CURVES, DARK, LIGHT, draw  # here, as it takes a second
    from weights.checkpoint import atomic_write  # likewise

    runs, names = read_runs(folders), [*CURVES]
    files = {
        "frontier.png": draw([["frontier", "texts"]], runs, LIGHT, "png"),
        "frontier-dark.png": draw([["frontier", "texts"]], runs, DARK, "png"),
        "curves.png": draw([names[:2], names[2:]], runs, LIGHT, "png"),
        "table.csv": _csv(runs).encode(),
        "report.html": _page(runs).encode(),  # last, as the paths are printed in this order
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        again = f"python -m train.report {shlex.join(map(str, folders))} --out FOLDER"
        raise ValueError(f"cannot write to {out}: {error}; report elsewhere: {again}") from error
    return [out / name for name in files]


def summary(folders: Sequence[Path]) -> str:
    """Return for a terminal the table, a text before and after, and what to run next."""
    runs = read_runs(folders)
    rows, (best, sentence) = shown(runs), finding(runs)
    table = [[*cells(best)], *([*cells(run).values()] for run in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["", *("  ".join(map(str.rjust, row, widths)) for row in table), "", sentence]
    for run in (rows[0], best):
        for text in run.typical[:1]:
            lines += ["", f"{run.label}: " + "".join(piece for piece, _ in pieces(run, text))]
    if (best.folder / "model.safetensors").exists():  # a killed run has none
        command = f"python -m train.sample --model {shlex.quote(str(best.folder))}"
        lines += ["", "Sample more text:", f"    {command}"]
    return "\n".join(map(visible, lines))


def _csv(runs: Sequence[Run]) -> str:
    """Write a line per row of the table, with everything measured, in full precision."""
    lines = []
    for run in shown(runs):
        named = {"run": visible(run.label), "step": max(run.evaluations), "asked": run.share}
        limit = {f"limit_{name}": value for name, value in asdict(run.limit).items()}
        lines.append(named | asdict(run.end) | limit)
    writer = csv.DictWriter(written := io.StringIO(), lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _page(runs: Sequence[Run]) -> str:
    from jinja2 import StrictUndefined, Template
    from markupsafe import Markup

    from train.report.figures import CURVES, DARK, LIGHT, draw

    template = Template(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,  # the model can write any text, markup included
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    figures = {name: [b64encode(draw([[name]], runs, theme, "svg")).decode()
                      for theme in (LIGHT, DARK)] for name in ("frontier", *CURVES)}  # fmt: skip
    settings = [{"folder": run.folder} | run.about | run.about.get("versions", {})
                | run.about["options"] for run in runs]  # fmt: skip
    return template.render(
        runs=runs, rows=shown(runs), finding=finding(runs)[1], figures=figures, curves=CURVES,
        light=LIGHT, dark=DARK, settings=settings, cells=cells, pieces=pieces,
    )  # fmt: skip
