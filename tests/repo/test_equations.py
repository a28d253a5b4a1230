"""Each equation leads to its line and to its test, and docs/kernels.md names code and tests."""

import ast
import importlib
import operator
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
assert {"triton_kl_div", "torch_kl_div", "fused_linear_kl_div"} <= {*MODULES}, "no longer found"
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_every_numbered_equation_is_cited_where_it_is_computed_and_by_a_test(module):
    """In a comment, or in a docstring below that of the module: `stride(1)` does not count. In a
    test as `module (1) (2)`."""
    with (ROOT / "kernels" / f"{module}.py").open(encoding="utf-8") as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    _, *prose = (t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))
    for number in NUMBERED.findall(DOCSTRINGS[module]):
        assert any(f"({number})" in text for text in prose), number
        assert re.search(rf"\b{module}( \(\d+\))* \({number}\)", TESTS), number


def test_every_row_of_the_table_leads_to_code_and_a_test_that_exist():
    """`| equation | `name` in [file](file) | `test` |` in docs/kernels.md."""
    kernels = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `(test_\w+)` \|$", kernels, re.MULTILINE)
    assert len(rows) >= 5
    module = ""
    for place, test in rows:
        if link := re.search(r"\]\(\.\./([\w/]+)\.py\)", place):  # else the file of the row above
            module = link[1].replace("/", ".")
        for name in re.findall(r"`([\w.]+)`", place):
            assert callable(operator.attrgetter(name)(importlib.import_module(module)))
        assert f"def {test}(" in TESTS
