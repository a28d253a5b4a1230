"""make demo, with a stand-in for Python that notes its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZE = "--model tiny --steps 120 --eval-every 60"
RATES = f"{SIZE} --lr 1e-5 1e-3 --out runs/demo/rates"
DIAL = f"{SIZE} --lr 1e-3 --tilt 3 5 --out runs/demo/dial"
REPORT = "ran -m train.report runs/demo/rates runs/demo/dial --out runs/demo"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile alone, and an environment that looks installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran $@"\n')
    python.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", ".venv/demo"):
        (tmp_path / name).touch()
    return tmp_path


def make(project: Path, *arguments: str) -> str:
    """Run make as from a shell, though the suite itself may be run by make; return its output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKELEVEL", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", *arguments], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo(project: Path) -> list[str]:
    """Run make demo; return what it printed, without the commands as they are announced."""
    lines = make(project, "demo").splitlines()
    return [line for line in lines if not line.startswith(("python -m", ".venv/bin/python -m"))]


def runs(*arguments: str) -> list[str]:
    """Return what the stand-in prints for the two commands and the report."""
    return [*(f"ran -m train.xfactor {words}" for words in arguments), REPORT]


def test_a_first_demo_starts(project: Path) -> None:
    """Without a word, with no folder there or one that an early end left empty."""
    assert demo(project) == runs(RATES, DIAL)
    (project / "runs/demo/rates").mkdir(parents=True)
    assert demo(project) == runs(RATES, DIAL)


def test_an_interrupted_demo_is_resumed(project: Path) -> None:
    """Each half by itself; nothing is removed."""
    config = project / "runs/demo/rates/lr-1e-05/config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    assert demo(project) == runs("--resume runs/demo/rates", DIAL)
    assert config.exists()


def test_a_finished_demo_starts_anew_and_says_so(project: Path) -> None:
    """The old one is gone."""
    config = project / "runs/demo/rates/lr-1e-05/config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    (project / "runs/demo/report.html").touch()
    assert demo(project) == ["runs/demo is complete: starting anew", *runs(RATES, DIAL)]
    assert list((project / "runs").iterdir()) == []


def test_the_demo_installs_less_than_the_tests(project: Path) -> None:
    """It needs no pytest, transformers, ruff and mypy."""
    for target, extras in (("demo", 0), ("test", 1), ("lint", 1)):
        assert make(project, "--dry-run", target).count("[dev]") == extras
