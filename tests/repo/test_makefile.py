"""What make would run, by a dry run."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dry_run(target: str, folder: Path) -> str:
    """Return the commands of a target in a folder that holds no environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKELEVEL", "MAKEFLAGS")}
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    command = ["make", "--dry-run", target]
    return subprocess.check_output(command, cwd=folder, env=environment, text=True)


def test_the_demo_installs_less_than_the_tests(tmp_path: Path) -> None:
    """It needs no pytest, transformers, ruff and mypy."""
    for target, extras in (("demo", 0), ("test", 1), ("lint", 1)):
        assert dry_run(target, tmp_path).count("[dev]") == extras


def test_the_demo_is_what_the_readme_shows(tmp_path: Path) -> None:
    """Command by command, as plain text."""
    done = dry_run("demo", tmp_path).splitlines()
    runs = [line.replace(".venv/bin/", "") for line in done if " -m train." in line]
    assert len(runs) >= 5
    assert "\n".join(["```sh", *runs, "```"]) in (ROOT / "README.md").read_text(encoding="utf-8")
