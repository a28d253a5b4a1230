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
COLAB = {"torch", "numpy", "matplotlib", "safetensors", "tqdm", "regex"}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")
SAMPLES = re.compile(r"\b(write|evaluate|generate)\(")


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def kept(cell: dict[str, Any]) -> str:
    """Return what the cell printed when the notebook was saved."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")


def test_the_cells_run_and_print_what_the_notebook_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace, as Jupyter would, from docs/; the cells hold assertions of their own.

    Numbers may differ by the rounding of another machine. Sampled text, and what is made from it,
    may then differ at once, so it is not compared.
    """
    matplotlib.use("Agg")
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shown: list[dict[str, str]] = []
    namespace: dict[str, Any] = {"display": lambda data, raw: shown.append(data)}
    for number, cell in enumerate(CODE):
        exec(compile(source(cell), f"cell {number}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert bool(printed) == bool(kept(cell)), source(cell)
        pictures = [out for out in cell["outputs"] if "image/png" in out.get("data", {})]
        assert len(pictures) == source(cell).count("plt.show()")
        assert all(out["output_type"] != "error" for out in cell["outputs"])
        if not SAMPLES.search(source(cell)):
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", kept(cell))
            pairs = zip(NUMBER.findall(printed), NUMBER.findall(kept(cell)), strict=True)
            for got, expected in pairs:
                assert float(got) == pytest.approx(float(expected), rel=1e-3), printed
    namespace["plt"].close("all")
    kept_badge = "".join(CODE[0]["outputs"][0]["data"]["text/html"])
    assert [data["text/html"] for data in shown] == [kept_badge], "run the first cell and save"


def test_every_number_in_the_text_is_in_a_cell() -> None:
    """A number of two digits or more stands in a cell's code or in what a cell printed."""
    cells = "\n".join(source(cell) + kept(cell) for cell in CODE)
    text = "\n".join(source(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*\d", text)
    assert numbers
    assert [number for number in numbers if number not in cells] == []


def test_the_first_cell_installs_all_that_colab_lacks() -> None:
    """Every dependency of the project that the other cells load is Colab's or on the list."""
    first, *rest = map(source, CODE)
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
