"""Report one or several runs.

    python -m train.report runs/a runs/b --out report/

Each argument is a run's folder or a folder of them.
"""

import sys
from pathlib import Path

import tyro

from train.report import print_report, say, write_report


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("report")) -> None:
    """Report one or several runs.

    Args:
        runs: each a run's folder or a folder of them
        out: folder for report.html, the figures and table.csv
    """
    try:
        paths = write_report(runs, out)
        print_report(runs)
        say(f"wrote {path}" for path in paths)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(report, prog="python -m train.report", description=__doc__)
