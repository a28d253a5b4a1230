"""Report runs: python -m train.report runs/a runs/b --out report"""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from train.command import command, say
from train.report import summary, write_report


def report(
    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ],
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None,
) -> None:
    """Write a report on one or several runs: a page, its figures, its table.

    Args:
        runs: report the runs in these folders, each the --out of a run
        out: write the report here (default: the run's own folder; "report" for several runs)
    """
    say(f"reading {len(runs)} run{'s' * (len(runs) != 1)}")
    write_report(runs, out or (runs[0] if len(runs) == 1 else Path("report")))
    say(summary(runs))


if __name__ == "__main__":
    with command():
        tyro.cli(report, prog="python -m train.report")
