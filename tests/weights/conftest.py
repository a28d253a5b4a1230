"""A small GPT-2 in the layout of the official files."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.weights.official_file import write_official


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The path of the file, in a folder of its own."""
    (tmp_path / "official").mkdir()
    return tmp_path / "official" / "model.safetensors"


@pytest.fixture(autouse=True)
def parameters(official: Path) -> dict[str, Tensor]:
    """Write the file and return its parameters, for a test to damage."""
    return write_official(official)
