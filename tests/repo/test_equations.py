"""Each numbered equation in a module docstring of kernels/ leads to its line and to its test."""

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
    """The pattern still finds them: the derivation in full, and two more modules."""
    assert NUMBERED.findall(DOCSTRINGS["triton_kl_div"]) == list("12345678")
    assert set(MODULES) >= {"triton_kl_div", "torch_kl_div", "fused_linear_kl_div"}


@pytest.mark.parametrize("module", MODULES)
def test_every_numbered_equation_is_cited_where_it_is_computed(module):
    """In a comment, or in a docstring below that of the module: `stride(1)` does not count."""
    with (ROOT / "kernels" / f"{module}.py").open(encoding="utf-8") as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    _, *prose = (t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))
    for number in NUMBERED.findall(DOCSTRINGS[module]):
        assert any(f"({number})" in text for text in prose), number


def docstrings_of_tests():
    """The docstring of every test function under tests/kernels and tests/train."""
    for folder in ("kernels", "train"):
        for path in (ROOT / "tests" / folder).rglob("test_*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("module", MODULES)
def test_every_numbered_equation_is_cited_by_a_test(module):
    """As `module (1) (2)`, in the docstring of a test that fails when the equation is wrong."""
    text = "\n".join(docstrings_of_tests())
    for number in NUMBERED.findall(DOCSTRINGS[module]):
        assert re.search(rf"\b{module}( \(\d+\))* \({number}\)", text), number
