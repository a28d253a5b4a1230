"""Report runs: python -m train.report runs/a runs/b --out report"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from train.report import summary, write_report
from train.report.texts import visible

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]


def report(runs: tyro.conf.Positional[Runs], out: Path | None = None) -> None:
    """Report one or several runs.

    Args:
        runs: folders that train.xfactor wrote, its --out
        out: write the report to this folder (default: the run's own, or "report" for several)
    """
    folders = [run.expanduser() for run in runs]
    default = folders[0] if len(folders) == 1 else Path("report")
    for path in write_report(folders, (out or default).expanduser()):
        print(visible(f"wrote {path}"))
    print(summary(folders))


if __name__ == "__main__":
    try:
        tyro.cli(report, prog="python -m train.report")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(visible(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit("stopped; the runs are unchanged: give the same command again")
