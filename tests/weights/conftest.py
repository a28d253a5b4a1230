"""A small GPT-2 in the layout of the official files."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.weights.official_file import SMALL, write_official


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The file, in a folder of its own."""
    (tmp_path / "official").mkdir()
    path = tmp_path / "official" / "model.safetensors"
    write_official(path, **SMALL)
    return path


@pytest.fixture
def parameters(tmp_path: Path) -> dict[str, Tensor]:
    """Its parameters, for a test to damage; it has left no file."""
    parameters = write_official(tmp_path / "written", **SMALL)
    (tmp_path / "written").unlink()
    return parameters
