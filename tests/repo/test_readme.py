"""The README's claims that a machine can check: its commands, its line counts, its links."""

import importlib
import operator
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("model", "weights", "kernels", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]
NEEDS_THE_OFFICIAL_FILE = ("python -m weights.official gpt2-medium", "python -m train.xfactor")
# The defaults take minutes and print the same table for any rows, so fewer stand in for them.
SHORTER = {
    "python -m kernels.benchmark": "--rows 8 --seconds 1",
    "python -m train.benchmark --model tiny": "--dtype float32 --repetitions 1",
    "python -m train.xfactor --model tiny --lr 1e-5 1e-3 --out runs/rates": "--steps 3",
    "python -m train.xfactor --model tiny --tilt 3 5 7 --lr 1e-3 --out runs/dial": (
        "--steps 2 --tilt 3 --inputs random"
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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_every_python_command_runs_after_those_above_it(command: str, working_folder: Path) -> None:
    """What needs the official file may end with the advice on how to get it."""
    arguments = shlex.split(f"{command} {SHORTER.get(command, '')}")[1:]
    if command in NEEDS_THE_OFFICIAL_FILE:
        arguments += [] if "weights" in command else ["--steps", "1"]
    done = run(arguments, working_folder)
    if command in NEEDS_THE_OFFICIAL_FILE and done.returncode == 1:
        assert "gpt2-medium is not cached" in done.stderr
        assert "tiny" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", MODULES)
def test_every_command_explains_itself(module: str, tmp_path: Path) -> None:
    """--help prints how each module that can be run is used, every default in words, and does none
    of its work."""
    done = run(["-m", module, "--help"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")
    for default in ("", "''", "None"):
        assert f"(default: {default})" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_line_counts_in_the_reading_order_are_right() -> None:
    """`| [path](path) | lines | ...`, against the files."""
    rows = re.findall(r"^\| \d+ \| \[([\w./]+)\]\(([\w./]+)\) \| (\d+) \|", README, re.MULTILINE)
    assert 6 <= len(rows) <= 8
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


def test_the_example_of_an_own_program_runs_and_is_right() -> None:
    """On a small GPT2LMHeadModel of transformers: both losses against F.kl_div in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=64, n_layer=1, n_head=1)).eval()
    ids, mask = torch.randint(211, (2, 8)), torch.arange(211) % 7 == 0
    logits = gpt2(ids).logits
    scope: dict[str, Any] = {"gpt2": gpt2, "ids": ids, "mask": mask, "logits": logits.detach()}
    scope["teacher_logits"] = teacher_logits = torch.randn(2, 8, 211)
    exec(code, scope)
    log_q, p = logits.double().log_softmax(-1), mask.double() / mask.sum()
    expected = F.kl_div(log_q, p.expand_as(log_q), reduction="none").sum(-1).mean()
    assert scope["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert gpt2.lm_head.weight.grad is not None
    distil = "fused_kl_div(logits, TeacherTarget(teacher_logits))"
    assert "TeacherTarget(teacher_logits)" in code
    log_p = teacher_logits.double().log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    assert eval(distil, scope).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_readme_is_short() -> None:
    """At most 1,000 words, tables and code included."""
    assert len(README.split()) <= 1000
