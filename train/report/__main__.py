"""Report runs: python -m train.report runs/a runs/b --out report"""

import sys
from pathlib import Path

import tyro

from train.report import summary, write_report
from train.report.texts import visible


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Report one or several runs.

    Args:
        runs: the folders to report, each the --out of a run
        out: write the report here (default: into the run's folder, or "report" for several)
    """
    for path in write_report(runs, out or (runs[0] if len(runs) == 1 else Path("report"))):
        print(visible(f"wrote {path}"))
    print(summary(runs))


if __name__ == "__main__":
    try:
        tyro.cli(report, prog="python -m train.report")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(visible(f"error: {error}"))
