"""Report runs: python -m train.report runs/a runs/b --out report/"""

from pathlib import Path
from typing import Annotated

import tyro

from train import console
from train.report import summary, write_report
from weights.layout import expand

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]


def report(runs: tyro.conf.Positional[Runs], out: Path = Path("report")) -> None:
    """Report one or several runs.

    Args:
        runs: the folder of a run, or a folder that contains runs
        out: folder for report.html, the figures and table.csv
    """
    folders = [expand(run) for run in runs]
    for path in write_report(folders, expand(out)):
        console.say(f"wrote {path}")
    console.say(summary(folders))


if __name__ == "__main__":
    with console.command():
        tyro.cli(report, prog="python -m train.report")
