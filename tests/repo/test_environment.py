"""Commands stop libgomp's threads from spinning; libraries leave the environment alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = """
import os

print(os.environ.get("GOMP_SPINCOUNT"))
"""


def spin_count(code: str, **environment: str) -> str:
    """What a new process that runs `code` finds in its environment, once torch is loaded."""
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code + SHOWN]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()[0]


@pytest.mark.parametrize("package", ["train", "tests"])
def test_commands_and_tests_set_the_spin_count_before_torch_is_loaded(package: str) -> None:
    """1,000; a value that the user has set wins."""
    code = f"import {package}, sys; assert 'torch' not in sys.modules; import torch"
    assert spin_count(code) == "1000"
    assert spin_count(code, GOMP_SPINCOUNT="7") == "7"


@pytest.mark.parametrize("package", ["kernels", "model", "weights"])
def test_a_library_changes_nobodys_environment(package: str) -> None:
    """Neither this variable nor any other."""
    code = f"import os; before = dict(os.environ); import {package}; assert os.environ == before"
    assert spin_count(code) == "None"
