"""The README's claims that a machine can check: its commands, its line counts, its links."""

import importlib
import operator
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
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    if "runs/demo"
    not in block  # test_makefile.py compares these with the Makefile, .ci/run runs them
    for line in block.splitlines()
    if line.strip()
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NEEDS_THE_OFFICIAL_FILE = ("python -m weights.official gpt2-medium", "python -m train.xfactor")
# The defaults take minutes and take the same path, so fewer stand in for them.
SHORTER = {
    "python -m kernels.benchmark --rows 256": "--rows 8 --seconds 1",
    "python -m train.benchmark --model tiny": "--dtype float32 --repetitions 1",
    "python -m train.xfactor --model tiny --lr 1e-3 --share 0.2": "--steps 1 --batch 1",
}


def test_the_commands_are_found() -> None:
    """The pattern still finds them: every module that the README is about is run."""
    text = "\n".join(COMMANDS)
    for module in ("kernels.benchmark", "kernels.compile_report", "train.xfactor", "weights."):
        assert module in text


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all commands: what one of them leaves there must not stop the next."""
    return tmp_path_factory.mktemp("readme")


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments in a folder, offline, on this checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_command_and_snippet_runs_in_the_order_of_the_readme(working_folder: Path) -> None:
    """In fresh processes. What needs the official file may end with the advice how to get it."""
    for command in (c for c in COMMANDS if c.startswith("python ")):
        words = shlex.split(command)[1:]
        for option, value in batched(shlex.split(SHORTER.get(command, ""))):
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
        if command in NEEDS_THE_OFFICIAL_FILE and "weights" not in command:
            words += ["--out", "official"]
        done = run(words, working_folder)
        if command in NEEDS_THE_OFFICIAL_FILE and done.returncode == 1:
            assert "gpt2-medium is not cached" in done.stderr
        else:
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert len(SNIPPETS) >= 4
    for snippet in SNIPPETS:
        done = run(["-c", snippet], working_folder)
        assert done.returncode == 0, f"{snippet}\n{done.stderr[-2000:]}"


def batched(words: list[str]) -> list[tuple[str, str]]:
    """Return options with their values."""
    return list(zip(words[::2], words[1::2], strict=True))


def test_line_counts_in_the_reading_order_are_right() -> None:
    """`| [path](path) | lines | ...`, against the files."""
    rows = re.findall(r"^\| \d+ \| \[([\w./]+)\]\(([\w./]+)\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 6
    for shown, path, lines in rows:
        assert shown == path
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines), path


def test_every_equation_leads_to_code_and_a_test_that_exist() -> None:
    """`| equation | `name` in [file](file) | `test` |`, against the files and the tests."""
    kernels = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `(test_\w+)` \|$", kernels, re.MULTILINE)
    assert len(rows) >= 5
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    module = ""
    for place, test in rows:
        if link := re.search(r"\]\(\.\./([\w/]+)\.py\)", place):  # else the file of the row above
            module = link[1].replace("/", ".")
        for name in re.findall(r"`([\w.]+)`", place):
            assert callable(operator.attrgetter(name)(importlib.import_module(module)))
        assert f"def {test}(" in tests


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/kernels.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link and picture is a file of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link
