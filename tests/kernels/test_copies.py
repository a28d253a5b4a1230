"""Copies of the folder under other names, and what `python -m` runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copies(tmp_path):
    """`one` and `app.two`, the second of which has all losses twice as large."""
    for name in ("one", "app/two"):
        shutil.copytree(ROOT / "kernels", tmp_path / name)
    path = tmp_path / "app/two/torch_kl_div.py"
    text = path.read_text()
    changed = text.replace("return loss, lse, norm", "return 2 * loss, lse, norm")
    assert changed != text
    path.write_text(changed)
    return tmp_path


def test_two_copies_in_one_process_run_their_own_code(copies):
    """In either order of import: log 3 and twice log 3 for level logits, in both losses."""
    for first, second in (("one", "app.two"), ("app.two", "one")):
        code = f"""
import importlib, torch
{first!r}, [importlib.import_module(n) for n in ({first!r}, {second!r})]
import one, app.two
mask = torch.arange(9) < 3
for package, factor in ((one, 1), (app.two, 2), (one, 1)):
    z, h, w = (torch.zeros(s, requires_grad=True) for s in ((2, 9), (2, 4), (9, 4)))
    for loss in (
        package.fused_kl_div(z, package.TwoLevelTarget(mask)),
        package.fused_linear_kl_div(h, w, package.TwoLevelTarget(mask)),
    ):
        torch.testing.assert_close(loss.detach(), factor * torch.tensor(3.0).log())
        loss.backward()
"""
        result = run(copies, "-c", code)
        assert result.returncode == 0, result.stderr


def test_a_module_of_ones_own_inside_a_copy_runs(copies):
    """`python -m app.two.mine` runs it; `python -m app.two` names what there is to run."""
    (copies / "app/two/mine.py").write_text("from . import fused_kl_div; print('mine ran')")
    assert run(copies, "-m", "app.two.mine").stdout == "mine ran\n"
    result = run(copies, "-m", "app.two")
    assert result.returncode == 1
    assert "python -m app.two.benchmark" in result.stderr
