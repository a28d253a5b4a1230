"""Ctrl-C ends a command of weights, from its first import on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path: Path) -> None:
    """They take seconds; a module in place of torch sends the signal."""
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 2); os.read(0, 1)")
    command = [sys.executable, "-m", "weights.official", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-2, b"")
