"""A small model to start runs from, a command on it, and that command's run, never stopped."""

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model import GPT2, GPT2Config
from tests.train import quick_run
from weights import save_weights


@pytest.fixture(scope="session")
def small_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model over the whole vocabulary, saved as the official files are."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1))
    save_weights(model.state_dict(), folder)
    return folder


@pytest.fixture(scope="session")
def small_command(small_start: Path) -> list[str]:
    """Four steps on that model, each saved, and three evaluations."""
    size = ["--steps", "4", "--batch", "2", "--length", "8", "--lr", "1e-2", "--eval-every", "2"]
    return ["--model", str(small_start), "--tokens", quick_run.PATTERN, *size]


@pytest.fixture(scope="session")
def whole_run(small_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that command's run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with patch("torch.cuda.is_available", lambda: False):  # as in the tests that compare with it
        quick_run.command([*small_command, "--out", str(out)])
    return out


@pytest.fixture
def copy(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, to continue or to damage."""
    return shutil.copytree(whole_run, tmp_path / "copy")
