"""For the whole suite: which device a test is meant for; settings are put back.

tests/kernels        a GPU if there is one, else the CPU (kl_cases.DEVICE)
a test with `gpu`    the second device, on every machine
a test with `cuda`   the second device, and a GPU too if there is one
any other test       the CPU, also on a machine with a GPU: bit for bit is the CPU's
"""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = {Path(__file__).parent / "kernels"}
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # where a shell started pytest with an &
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def process_settings_are_the_defaults() -> Iterator[None]:
    """What `train.cpu.prepare` sets for its process, in a fixture of the session or in a test, must
    reach neither the test nor the next one's fixtures."""

    def put_back() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_flash_sdp(True)

    put_back()
    yield
    put_back()


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
