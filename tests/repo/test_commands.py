"""A module that is no command, run by mistake, says what to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = {
    "model": [],
    "weights": ["official"],
    "kernels": ["benchmark", "compile_report"],
    "train": ["xfactor", "sample", "walkthrough", "benchmark"],  # and two folders
}
COMMANDS = [f"{leaf}.{command}" for leaf, commands in LEAVES.items() for command in commands]
OTHERS = [
    f"{leaf}.{path.stem}".removesuffix(".__init__")
    for leaf, commands in LEAVES.items()
    for path in sorted((ROOT / leaf).glob("*.py"))
    if path.stem not in commands
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", OTHERS)
def test_a_module_run_by_mistake_says_what_to_run(module: str) -> None:
    """One line with a command, status 1, and no time spent on imports."""
    done = run("-m", module)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "python -m " in line
    assert done.stdout == ""


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_runs_however_python_is_told(module: str) -> None:
    """`-m module` with the space and without it."""
    for arguments in (["-m", module], [f"-m{module}"]):
        assert run(*arguments, "--help").stdout.startswith(f"usage: python -m {module}")


@pytest.mark.parametrize("leaf", LEAVES)
def test_another_package_that_imports_a_leaf_runs(leaf: str, tmp_path: Path) -> None:
    """Imported while Python looks for a module of that package, whose name begins alike."""
    package = tmp_path / f"{leaf}_zoo"
    package.mkdir()
    (package / "__init__.py").write_text(f"import {leaf}")
    (package / "__main__.py").write_text("print('ran')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", package.name]
    assert subprocess.check_output(command, cwd=ROOT, env=environment) == b"ran\n"
