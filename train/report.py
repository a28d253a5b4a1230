"""What people look at when a run is over: report.html, its figures as PNG, its table as CSV.

    python -m train.report runs/a runs/b --out report/

Each argument is a run's folder or a folder of them. The page stands alone: figures are embedded,
nothing is fetched, no script runs. Every word about a run is a measure of it; what the original
report claimed stands in rows of its own.
"""

import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train.results import RunRecord, read_runs
from train.samples import choose
from train.table import FORMATS, REPORTED, as_csv, measured, shown
from weights.checkpoint import atomic_write

TEMPLATE = "report.html.jinja"


def write_report(run_folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the figures, table.csv and report.html into `out`; returns their paths.

    Args:
        run_folders: each a run's folder or a folder of them, as train.xfactor writes.

    Raises:
        ValueError: a folder that is no run; `out` cannot be written. The runs stay as they are.
    """
    from train.figures import LIGHT, draw  # here: half a second, needed once

    runs = read_runs(run_folders)
    files = {f"{name}.png": image for name, image in draw(runs, LIGHT, "png").items()}
    files["table.csv"] = as_csv(runs).encode("utf-8")
    files["report.html"] = _html(runs).encode("utf-8")  # last: its path is printed last
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        folders = " ".join(map(str, run_folders))
        raise ValueError(
            f"cannot write the report to {out}: {error}. The runs are whole; report them elsewhere "
            f"with python -m train.report {folders} --out FOLDER"
        ) from error
    return [out / name for name in files]


def print_report(run_folders: Sequence[Path]) -> None:
    """The table, then a sample of every prompt before and after each run."""
    runs = read_runs(run_folders)
    cells = [[shown(name, row.get(name)) for name in FORMATS] for row in measured(runs)]
    widths = [max(map(len, column)) for column in zip(FORMATS, *cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in [FORMATS, *cells]]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print("\n" + "\n".join(lines))
    print(
        "\nR: the share of members among sampled tokens. Perplexities: of a fixed passage under "
        "the model, and of\nthe samples under the model before fine-tuning; the lower, the more "
        "natural."
    )
    for prompt, specimens in choose(runs).items():
        print(f"\n{prompt!r}")
        for specimen in specimens:
            if specimen.when != "during":
                who = "before" if specimen.when == "before" else f"lr {specimen.run.label}"
                print(f"  {who:>9}: {''.join(piece.text for piece in specimen.pieces)}")


def _html(runs: Sequence[RunRecord]) -> str:
    from train.figures import DARK, LIGHT, colours, draw

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # the model can write any text, markup included
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = draw(runs, LIGHT, "svg"), draw(runs, DARK, "svg")
    return environment.get_template(TEMPLATE).render(
        runs=runs,
        goals=list(dict.fromkeys(run.about["goal"] for run in runs)),
        rows=measured(runs),
        reported=REPORTED,
        columns=list(FORMATS),
        shown=shown,
        figures={name: (_data_uri(light[name]), _data_uri(dark[name])) for name in light},
        colours=(colours(runs, LIGHT), colours(runs, DARK)),
        samples=choose(runs),
        configuration=_configuration(runs),
    )


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _configuration(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """What was asked for and on what it ran: a row a setting, its value for each run.

    An option that none of them was given has no row.
    """

    def settings(run: RunRecord) -> dict[str, Any]:
        about = {
            k: v for k, v in run.about.items() if k not in ("options", "versions", "member_ids")
        }
        options = {f"--{k.replace('_', '-')}": v for k, v in run.about["options"].items()}
        total = f"{sum(run.seconds):,.1f} s in {len(run.seconds):,} steps"
        return about | run.about["versions"] | {"time": total, "folder": run.folder} | options

    def written(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(written, value))
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    columns = [settings(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [written(column.get(name)) for column in columns]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


@dataclass(frozen=True)
class Options:
    """Report one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # each a run's folder or a folder of them
    out: Path = Path("report")  # folder for report.html, the figures and table.csv


def main() -> None:
    """The command line: a folder that is no run ends in one line."""
    options = tyro.cli(Options, description=__doc__)
    try:
        for path in write_report(options.runs, options.out):
            print(f"wrote {path}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
