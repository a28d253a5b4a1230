"""What make would run, by a dry run."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_is_what_the_readme_shows_and_installs_less_than_the_tests(tmp_path: Path) -> None:
    """Command by command, as plain text; without pytest, transformers, ruff and mypy."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKELEVEL", "MAKEFLAGS")}
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    demo, test = (
        subprocess.check_output(["make", "-n", target], cwd=tmp_path, env=environment, text=True)
        for target in ("demo", "test")
    )
    assert "[dev]" not in demo
    assert "[dev]" in test
    runs = [line.replace(".venv/bin/", "") for line in demo.splitlines() if " -m train." in line]
    assert len(runs) >= 5
    assert "\n".join(["```sh", *runs, "```"]) in (ROOT / "README.md").read_text(encoding="utf-8")
