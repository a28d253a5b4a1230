"""docs/xfactor.ipynb: its cells run in order, and the outputs kept in it are theirs."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import matplotlib
import pytest

DOCS = Path(__file__).parents[2] / "docs"
CELLS = json.loads((DOCS / "xfactor.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
COLAB = {
    "torch",
    "numpy",
    "matplotlib",
    "safetensors",
    "tqdm",
    "pydantic",
    "annotated-types",
    "regex",
}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")


def kept(cell: dict[str, Any]) -> str:
    """Return what the cell printed when the notebook was saved."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")


def test_the_cells_run_and_print_what_the_notebook_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace, as Jupyter would, from docs/; the cells hold assertions of their own.

    Numbers may differ by the rounding of another machine. Sampled text may then differ at once, so
    it is not compared.
    """
    matplotlib.use("Agg")
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(CODE):
        source = "".join(cell["source"])
        exec(compile(source, f"cell {number}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert bool(printed) == bool(kept(cell)), source
        if "write(" not in source:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", kept(cell))
            pairs = zip(NUMBER.findall(printed), NUMBER.findall(kept(cell)), strict=True)
            for got, expected in pairs:
                assert float(got) == pytest.approx(float(expected), rel=1e-3), printed
    namespace["plt"].close("all")


def test_every_figure_is_kept() -> None:
    """A cell that shows one has a picture among its outputs, and none ended in an error."""
    for cell in CODE:
        pictures = [out for out in cell["outputs"] if "image/png" in out.get("data", {})]
        assert len(pictures) == "".join(cell["source"]).count("plt.show()")
        assert all(out["output_type"] != "error" for out in cell["outputs"])


def test_the_first_cell_installs_all_that_colab_lacks() -> None:
    """Every dependency of the project that the other cells load is Colab's or on the list."""
    first, *rest = ("".join(cell["source"]) for cell in CODE)
    imports = re.findall(r"^(?:import|from) .*$", "\n".join(rest), flags=re.M)
    code = "\n".join([*imports, "load_tokenizer()", "import sys; print(*sys.modules)"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCS.parent, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    loaded = {name for name in names if name.replace("-", "_") in done.stdout.split()}
    assert {"torch", "tiktoken", "tyro"} <= loaded
    assert all(f'"{name}' in first for name in loaded - COLAB)
