"""The arrows between the folders, what an import may cost, and names that others use too."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "kernels", "weights", "train")
MAY_IMPORT = {
    "model": set(),  # a leaf names itself by relative imports only, so it works under any name
    "kernels": set(),
    "weights": set(),
    "train": {"train", "model", "kernels", "weights"},
}


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Return what Python prints; fail with its errors if its status is not 0."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_folders(path: Path) -> set[str]:
    """The project's folders that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names.add(str(node.module).split(".")[0])
            else:
                assert node.level < len(path.relative_to(ROOT).parts), f"{path} leaves its folder"
    return names & {*FOLDERS, "tests"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_three_leaves_import_nothing_of_each_other(folder: str) -> None:
    """tests -> train -> {model, kernels, weights}, read off the source."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imported_folders(path) <= MAY_IMPORT[folder], path


USES = {
    "model": "borrowed.GPT2Config()",
    "kernels": """
mask = torch.arange(9) < 3
loss = borrowed.fused_kl_div(torch.zeros(2, 9), borrowed.TwoLevelTarget(mask))
torch.testing.assert_close(loss, torch.tensor(3.0).log())""",
    "weights": "borrowed.load_weights('tiny')",
}


@pytest.mark.parametrize("folder", USES)
def test_a_leaf_works_as_a_copy_under_another_name(folder: str, tmp_path: Path) -> None:
    """Every module of the copy is imported, and the copy used, where the project itself cannot be
    found: log(9 / 3) is the loss of level logits. A module added to it runs as a command."""
    shutil.copytree(ROOT / folder, tmp_path / "borrowed")
    stems = [path.stem for path in (ROOT / folder).glob("*.py")]
    imports = (f"import borrowed.{stem}" for stem in stems if not stem.startswith("__"))
    code = "\n".join(["import borrowed, torch", *imports, USES[folder]])
    run("-c", code, cwd=tmp_path)
    (tmp_path / "borrowed" / "my_experiment.py").write_text("from . import *; print('ran')")
    assert run("-m", "borrowed.my_experiment", cwd=tmp_path) == "ran\n"


@pytest.mark.parametrize("package", ["model", "kernels"])
def test_importing_a_leaf_takes_no_triton_and_under_a_second(package: str) -> None:
    """Beyond torch's own import, in a fresh process; CPU seconds, not the clock's."""
    code = f"""
import sys, time
import torch
before = time.process_time()
import {package}
print(time.process_time() - before, "triton" in sys.modules)
"""
    seconds, triton = run("-c", code).split()
    assert triton == "False"
    assert float(seconds) < 1.0


def test_a_load_imports_neither_torchs_compiler_nor_the_hub_library() -> None:
    """Drawing random weights on the meta device would import torch._dynamo: seconds of a load. Only
    official names need huggingface_hub: a third of a second."""
    code = """
import sys
from model import GPT2
from weights import load_weights
GPT2.from_state_dict(load_weights("tiny"))
print("torch._dynamo" in sys.modules, "huggingface_hub" in sys.modules)
"""
    assert run("-c", code) == "False False\n"


@pytest.mark.parametrize("leaf", USES)
def test_a_leaf_run_as_a_command_says_what_to_run(leaf: str) -> None:
    """A command in each line, status 1."""
    done = subprocess.run([sys.executable, "-m", leaf], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr
    assert all("python -m " in line for line in done.stderr.splitlines())


def test_transformers_works_beside_a_package_named_kernels(tmp_path: Path) -> None:
    """Hugging Face's package of that name, here a stub of a version that transformers accepts. From
    this root transformers imports our folder in its place, and fails, unless told otherwise."""
    requirements = map(Requirement, metadata("transformers").get_all("Requires-Dist"))
    [accepted] = {r.specifier for r in requirements if r.name == "kernels"}
    version = next(s.version for s in accepted if s.operator in (">=", "=="))
    folder = tmp_path / f"kernels-{version}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    with pytest.raises(AssertionError, match="cannot import name"):
        run("-c", "from transformers import GPT2LMHeadModel", PYTHONPATH=str(tmp_path))
    code = "import kernels, sys, tests.model.oracle; assert sys.modules['kernels'] is kernels"
    run("-c", code, PYTHONPATH=str(tmp_path))
