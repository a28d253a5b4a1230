"""The arrows between the folders, what an import costs and sets, and names that others use too."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LEAVES = ("model", "kernels", "weights")


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Return what Python prints; fail with its errors if its status is not 0."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_three_leaves_import_nothing_of_each_other() -> None:
    """tests -> train -> {model, kernels, weights}, read off the source. A leaf names itself by
    relative imports only, so it works under any name."""
    for folder in (*LEAVES, "train"):
        refused = {"tests"} if folder == "train" else {"tests", "train", *LEAVES, ".."}
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            imported = re.findall(r"^\s*(?:from|import) (\w+|\.\.)", text, re.MULTILINE)
            assert not refused & {*imported}, path


USES = {
    "model": "borrowed.GPT2Config()",
    "kernels": """
mask = torch.arange(9) < 3
loss = borrowed.fused_kl_div(torch.zeros(2, 9), borrowed.TwoLevelTarget(mask))
torch.testing.assert_close(loss, torch.tensor(3.0).log())""",
    "weights": "borrowed.load_weights('tiny')",
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_works_as_a_copy_under_another_name(leaf: str, tmp_path: Path) -> None:
    """Every module of the copy is imported, and the copy used, by a module added to it that runs as
    a command where the project itself cannot be found: log(9 / 3) is the loss of level logits."""
    shutil.copytree(ROOT / leaf, tmp_path / "borrowed")
    stems = [path.stem for path in (ROOT / leaf).glob("*.py") if path.stem[0] != "_"]
    imports = (f"from . import {stem}" for stem in stems)
    code = "\n".join(["import borrowed, torch", *imports, USES[leaf], "print('ran')"])
    (tmp_path / "borrowed" / "my_experiment.py").write_text(code)
    assert run("-m", "borrowed.my_experiment", cwd=tmp_path) == "ran\n"


def test_a_load_imports_neither_triton_nor_torchs_compiler_nor_the_hub_library() -> None:
    """Each costs a part of a second or more. Drawing random weights on the meta device would import
    torch._dynamo; only official names need huggingface_hub."""
    code = """
import sys, kernels
from model import GPT2
from weights import load_weights
GPT2.from_state_dict(load_weights("tiny"))
print({"triton", "torch._dynamo", "huggingface_hub"} & set(sys.modules))
"""
    assert run("-c", code) == "set()\n"


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
def test_commands_and_tests_alone_set_the_spin_count(
    code: str, given: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that libgomp's threads do not spin, before torch is loaded, which reads it; a value that
    the user has set wins."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    show = "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run("-c", code + show, **given) == f"{found}\n"


@pytest.mark.parametrize("package", [*LEAVES, "train"])
def test_a_package_run_by_mistake_says_what_to_run(package: str) -> None:
    """`python -m model`: nothing but lines with commands, and status 1."""
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(package, run_name="__main__")
    assert all("python -m " in line for line in str(stopped.value).splitlines())


def test_transformers_works_beside_a_package_named_kernels(tmp_path: Path) -> None:
    """Hugging Face's package of that name, here a stub of a version that transformers accepts. From
    this root transformers imports our folder in its place, and fails, unless told otherwise, as the
    tests and train.benchmark do."""
    requirements = map(Requirement, metadata("transformers").get_all("Requires-Dist"))
    [accepted] = {r.specifier for r in requirements if r.name == "kernels"}
    version = next(s.version for s in accepted if s.operator in (">=", "=="))
    folder = tmp_path / f"kernels-{version}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    stub = str(tmp_path)
    with pytest.raises(AssertionError, match="cannot import name"):
        run("-c", "from transformers import GPT2LMHeadModel", PYTHONPATH=stub)
    code = "import kernels, sys, tests.model.oracle; assert sys.modules['kernels'] is kernels"
    run("-c", code, PYTHONPATH=stub)
    size = ["--dtype", "float32", "--repetitions", "1", "--batch", "1", "--length", "8"]
    table = run("-m", "train.benchmark", "--model", "tiny", *size, PYTHONPATH=stub)
    results = json.loads(table.splitlines()[-1])["results"]
    assert [*map(set, results.values())] == 4 * [{"ours", "transformers"}]
    assert all(value > 0 for values in results.values() for value in values.values())
