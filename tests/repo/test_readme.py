"""What README and the documents say that a machine can check: commands, line counts, links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# What is added to a command so that it takes seconds. A folder of a run is made by the first.
SHORTER = {
    "python -m train.xfactor --model tiny --lr 1e-3 --share 0.2": "--steps 1 --batch 1",
    "python -m train.sample --model runs/xfactor": "--length 4",
    "python -m kernels.benchmark --rows 256": "--vocab 1001 --width 16 --seconds 0",
    "python -m train.xfactor --out runs/medium": "",
}
ELSEWHERE = {  # the test that runs it
    "make demo": "test_readme.py",
    "make test": "test_readme.py",
    "python -m train.walkthrough": "test_walkthrough.py",
    "python -m kernels.compile_report": "test_compile_report.py",
    "python -m train.benchmark --model tiny": "test_imports.py",
    "python -m weights.official gpt2-medium": "test_official.py",
    "torchrun --nproc-per-node 8 -m train.xfactor --batch 32 --out runs/batch-32": "test_ranks.py",
}


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments in a folder, offline, with an empty cache, on this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder, in which the README's first command has run, with short evaluations."""
    folder = tmp_path_factory.mktemp("readme")
    command, options = next(iter(SHORTER.items()))
    words = shlex.split(f"{command} {options}".replace("train.xfactor", "tests.train.quick_run"))
    done = run(words[1:], folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_command_is_run_here_or_elsewhere() -> None:
    """Those of the demo are the Makefile's, which .ci/run runs."""
    commands = {line for line in LINES if line and "runs/demo" not in line}
    assert commands == {*SHORTER, *ELSEWHERE}
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {*ELSEWHERE.values()} <= tests


def test_the_demo_is_the_makefiles_and_installs_less_than_the_tests(tmp_path: Path) -> None:
    """Command by command, by a dry run; without pytest, transformers, ruff and mypy."""
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
    assert "\n".join(["```sh", *runs, "```"]) in README


@pytest.mark.parametrize("command", list(SHORTER)[1:])
def test_a_command_runs(command: str, folder: Path) -> None:
    """What needs the official file ends with the advice how to get it."""
    done = run(shlex.split(f"{command} {SHORTER[command]}")[1:], folder)
    assert done.returncode == ("medium" in command), done.stderr
    assert ("gpt2-medium is not cached" in done.stderr) == ("medium" in command)
    assert done.stdout


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_as_it_stands(number: int, folder: Path) -> None:
    """In a fresh process; the first opens a run in transformers."""
    done = run(["-c", SNIPPETS[number]], folder)
    assert done.returncode == 0, done.stderr


def test_line_counts_in_the_reading_order_are_right() -> None:
    """`| [path](path) | lines | ...`, against the files."""
    rows = re.findall(r"^\| \d+ \| \[([\w./]+)\]\(([\w./]+)\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 6
    for shown, path, lines in rows:
        assert shown == path
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines), path


def test_publishing_is_one_edit() -> None:
    """One address: to clone, to open in Colab, and in the notebook's variable."""
    places = re.compile(r'(?:github\.com/|/github/|REPOSITORY = \\")([\w.-]+/[\w.-]+)')
    notebook = places.findall((ROOT / "docs" / "xfactor.ipynb").read_text(encoding="utf-8"))
    assert len(places.findall(README)) == len(notebook) == 2
    assert len({*places.findall(README), *notebook}) == 1


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/kernels.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link and picture is a file of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link
