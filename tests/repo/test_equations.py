"""From an equation in a docstring of kernels/ to its line in the code, and to its test."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCSTRINGS = {
    path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    for path in sorted((ROOT / "kernels").glob("*.py"))
}
NUMBERED = re.compile(r"^    .* \((\d+)\)$", re.MULTILINE)  # an indented line and its number
MODULES = [name for name, docstring in DOCSTRINGS.items() if NUMBERED.search(docstring)]


def test_the_equations_are_found():
    """The pattern still finds them: the derivation in full, and three more modules."""
    assert NUMBERED.findall(DOCSTRINGS["triton_kl_div"]) == list("1234567")
    assert set(MODULES) >= {"triton_kl_div", "torch_kl_div", "fused_linear_kl_div", "fused_kl_div"}


@pytest.mark.parametrize("module", MODULES)
def test_every_numbered_equation_is_cited_where_it_is_computed(module):
    """In a comment, or in a docstring below that of the module: `stride(1)` is no citation."""
    with (ROOT / "kernels" / f"{module}.py").open(encoding="utf-8") as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    _, *prose = (t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))
    for number in NUMBERED.findall(DOCSTRINGS[module]):
        assert any(f"({number})" in text for text in prose), number


@pytest.mark.parametrize("module", MODULES)
def test_every_numbered_equation_names_its_test(module):
    """In the table under "Guarded"; each test named there is one of tests/."""
    _, guards = DOCSTRINGS[module].split("Guarded.")
    for file, test in re.findall(r"(test_\w+\.py)::(test_\w+)", guards):
        [path] = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text(encoding="utf-8"), test
    for number in NUMBERED.findall(DOCSTRINGS[module]):
        assert re.search(rf"^    .*\({number}\).*\.py::test_", guards, re.MULTILINE), number
