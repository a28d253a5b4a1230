"""For the whole suite: settings are put back; a small model to start a run from, and that run,
never stopped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def process_settings_are_put_back() -> Iterator[None]:
    """What `train.cpu.prepare` sets for its process must not reach another test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.fixture(scope="session")
def small_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model over the tokenizer's whole vocabulary, saved as the official files are."""
    from model import GPT2, GPT2Config  # not above: tests of the imports want a bare process
    from weights import save_weights

    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1))
    save_weights(model.state_dict(), folder)
    return folder


@pytest.fixture(scope="session")
def small_command(small_start: Path) -> list[str]:
    """The experiment on that model for 8 steps, each saved, two of them evaluated."""
    (small_start / "ids").write_text("55\n87\n")
    goal = ["--weights", str(small_start), "--tokens", str(small_start / "ids")]
    size = ["--steps", "8", "--batch", "2", "--length", "8", "--lr", "1e-2", "--save-every", "1"]
    return [*goal, *size, "--eval-every", "4"]


@pytest.fixture(scope="session")
def whole_run(small_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that command's run."""
    from tests.train import quick_run

    folder = tmp_path_factory.mktemp("whole")
    code, output = quick_run.run([*small_command, "--out", str(folder / "run")], folder / "log")
    assert code == 0, output
    return folder / "run" / "lr-0.01"
