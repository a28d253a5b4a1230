"""The README's claims that a machine can check: its commands, its line counts, its links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
NEEDS_THE_OFFICIAL_FILE = ("python -m weights.official gpt2-medium", "python -m train.xfactor")
# The defaults take minutes and print the same table for any rows, so fewer stand in for them.
SHORTER = {
    "python -m kernels.benchmark": "python -m kernels.benchmark --rows 8",
    "python -m train.xfactor --model tiny --lr 1e-5 1e-3": (
        "python -m train.xfactor --model tiny --lr 1e-5 1e-3 --steps 3"
    ),
    "python -m train.xfactor --model tiny --lr 3e-4 --steps 50": (
        "python -m train.xfactor --model tiny --lr 3e-4 --steps 5"
    ),
}


def test_the_commands_are_found() -> None:
    """The pattern still finds them: every module that the README is about is run."""
    text = "\n".join(COMMANDS)
    for module in ("kernels.benchmark", "kernels.compile_report", "train.xfactor", "weights."):
        assert module in text


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    """A dry run: the target is known, and what it would do is printed."""
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_every_python_command_runs(command: str, tmp_path: Path) -> None:
    """Offline; what needs the official file may end with the advice on how to get it."""
    arguments = shlex.split(SHORTER.get(command, command))[1:]
    if "train.xfactor" in command:
        arguments += ["--out", str(tmp_path / "out")]
    if command in NEEDS_THE_OFFICIAL_FILE:
        arguments += [] if "weights" in command else ["--steps", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if command in NEEDS_THE_OFFICIAL_FILE and done.returncode == 1:
        assert "gpt2-medium is not cached" in done.stderr
        assert "tiny" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]


def test_line_counts_in_the_reading_order_are_right() -> None:
    """`| [path](path) | lines | ...`, against the files."""
    rows = re.findall(r"^\| \d+ \| \[([\w./]+)\]\(([\w./]+)\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for shown, path, lines in rows:
        assert shown == path
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines), path


def test_links_lead_somewhere() -> None:
    """Every relative link and picture is a file of the repository."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
