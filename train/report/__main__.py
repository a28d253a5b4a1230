"""Report runs: python -m train.report runs/a runs/b --out report"""

from pathlib import Path

import tyro

from train.command import command, say
from train.report import summary, visible, write_report


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Report one or several runs.

    Args:
        runs: the folders to report, each the --out of a run
        out: write the report here (default: into the run's folder, or "report" for several)
    """
    for path in write_report(runs, out or (runs[0] if len(runs) == 1 else Path("report"))):
        say(visible(f"wrote {path}"))
    say(summary(runs))


if __name__ == "__main__":
    with command():
        tyro.cli(report, prog="python -m train.report")
