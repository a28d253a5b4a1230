"""For the whole suite: which device a test is meant for; settings are put back; a small model to
start a run from, and that run, never stopped.

    tests/kernels        a GPU if there is one, else the CPU (kl_cases.DEVICE)
    a test with `gpu`    the second device, on every machine
    a test with `cuda`   the second device, and a GPU too if there is one
    any other test       the CPU, also on a machine with a GPU: bit for bit is the CPU's
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = {Path(__file__).parent / "kernels"}


@pytest.fixture(autouse=True)
def process_settings_are_put_back() -> Iterator[None]:
    """What `train.cpu.prepare` sets for its process must not reach another test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.fixture(autouse=True)
def only_tests_that_ask_see_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES is for the processes that a test starts: this one has read it."""
    if {"gpu", "cuda"}.isdisjoint(request.fixturenames) and not KERNELS & {*request.path.parents}:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def gpu() -> Iterator[Any]:
    """The record of the second device, on which the test runs."""
    from tests.second_device import second_device  # not above: it imports torch's compiler

    with second_device() as record:
        yield record


@pytest.fixture(params=["second", "real"] if torch.cuda.is_available() else ["second"])
def cuda(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The record of the second device; None on a GPU."""
    from tests.second_device import second_device

    with second_device() if request.param == "second" else nullcontext() as record:
        yield record


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
