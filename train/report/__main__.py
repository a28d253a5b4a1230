"""Report runs: python -m train.report runs/a runs/b --out report/"""

from pathlib import Path
from typing import Annotated

import tyro

from train import console
from train.report import summary, write_report

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]


def report(runs: tyro.conf.Positional[Runs], out: Path = Path("report")) -> None:
    """Report one or several runs.

    Args:
        runs: each a run's folder or a folder of them
        out: folder for report.html, the figures and table.csv
    """
    for path in write_report(runs, out):
        console.say(f"wrote {path}")
    console.say(summary(runs))


if __name__ == "__main__":
    with console.command():
        tyro.cli(report, prog="python -m train.report")
