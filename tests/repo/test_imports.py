"""The arrows between the folders, and what an import may cost."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "kernels", "weights", "train")
MAY_IMPORT = {
    "model": set(),  # a leaf names itself by relative imports only, so it works under any name
    "kernels": set(),
    "weights": set(),
    "train": {"train", "model", "kernels", "weights"},
}


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
    found: log(9 / 3) is the loss of level logits."""
    shutil.copytree(ROOT / folder, tmp_path / "borrowed")
    stems = [path.stem for path in (ROOT / folder).glob("*.py")]
    imports = (f"import borrowed.{stem}" for stem in stems if not stem.startswith("__"))
    code = "\n".join(["import borrowed, torch", *imports, USES[folder]])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("package", ["model", "kernels"])
def test_importing_a_leaf_takes_no_triton_and_under_a_second(package: str) -> None:
    """Beyond torch's own import, in a fresh process; CPU seconds, not the clock's."""
    code = f"""
import sys, time
import torch
before = time.process_time()
import {package}
seconds = time.process_time() - before
print(seconds, *{{"triton"}} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *unwanted = done.stdout.split()
    assert unwanted == []
    assert float(seconds) < 1.0


def test_a_model_is_made_from_weights_without_torchs_compiler() -> None:
    """Drawing random weights on the meta device would import torch._dynamo: seconds of a load."""
    code = """
import sys
from model import GPT2
from weights import load_weights
GPT2.from_state_dict(load_weights("tiny"))
print("torch._dynamo" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
