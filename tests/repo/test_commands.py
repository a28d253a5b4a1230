"""A package that is run by mistake says what to run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["model", "weights", "kernels", "train"])
def test_a_package_run_by_mistake_says_what_to_run(package: str) -> None:
    """Nothing but lines with commands, and status 1."""
    command = [sys.executable, "-m", package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines
    assert all("python -m " in line for line in lines)
    assert done.stdout == ""
