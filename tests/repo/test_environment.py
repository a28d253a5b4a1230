"""Commands stop libgomp's threads from spinning; libraries leave the environment alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
COMMANDS = "import train, sys; assert 'torch' not in sys.modules"
LIBRARIES = (
    "import os; old = {**os.environ}; import kernels, model, weights; assert old == os.environ"
)


@pytest.mark.parametrize(
    ("code", "given", "found"),
    [
        (COMMANDS, {}, "1000"),
        (COMMANDS, {"GOMP_SPINCOUNT": "7"}, "7"),
        (COMMANDS.replace("train", "tests"), {}, "1000"),
        (LIBRARIES, {}, "None"),
    ],
)
def test_commands_and_tests_alone_set_the_spin_count(code, given, found) -> None:
    """Before torch is loaded, which reads it; a value that the user has set wins."""
    environment = {name: x for name, x in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    command = [sys.executable, "-c", code + SHOW]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (found, "")
