"""Publishing is one edit: the README and the notebook have one address of this repository."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_and_notebook_have_one_address() -> None:
    """To clone, to open in Colab, and in the notebook's variable."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/xfactor.ipynb")]
    places = re.compile(r'(?:github\.com/|/github/|REPOSITORY = \\")([\w.-]+/[\w.-]+)')
    readme, notebook = map(places.findall, texts)
    assert len(readme) == len(notebook) == 2
    assert len({*readme, *notebook}) == 1
