"""Several ranks on the CPU against one process; torchrun starts them once, forks elsewhere."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.train import quick_run
from tests.train.quick_run import assert_same_run, losses
from train import ranks
from train.xfactor import Options, check
from weights import layout_of, load_weights

ROOT = Path(__file__).parents[2]


def as_rank(arguments: list[str], rank: int, port: int, function: quick_run.Function) -> None:
    """Run the command as one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(arguments)


def run(arguments: list[str], folder: Path, **signals: int) -> list[tuple[int, str]]:
    """Run the command on two ranks, some of which get a signal; return exit codes and outputs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank, name in enumerate(("main", "other")):
        number = [signals[name]] if name in signals else []
        function = quick_run.signalled("train.xfactor.get_batch", 3, *number)
        as_one = partial(as_rank, rank=rank, port=port, function=function)
        processes.append((quick_run.start(arguments, folder / name, as_one), folder / name))
    return [quick_run.finish(*process) for process in processes]


def test_two_processes_make_the_run_of_one(small_start: Path, tmp_path: Path) -> None:
    """Losses to 1e-6 and weights after five steps; Adam's rate bounds what rounding can do."""
    size = ["--model", str(small_start), "--steps", "5", "--batch", "4", "--length", "16"]
    command = [*size, "--lr", "1e-3", "--out"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "tests.train.quick_run", *command, tmp_path / "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 5 of 5") == 1  # the main rank alone prints
    assert done.stdout.count("threads left:") == 2
    assert "gloo" not in done.stdout  # else now and then a process aborts while it ends
    quick_run.command([*command, str(tmp_path / "1")])
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=0, abs=1e-6)
    start, expected, got = map(load_weights, (small_start, tmp_path / "1", tmp_path / "2"))
    for name, p in expected.items():
        torch.testing.assert_close(got[name], p, rtol=0, atol=2e-5, msg=name)
    assert (expected["wte.weight"] - start["wte.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "number"), [("other", 15), ("main", 9), ("other", 9)])
def test_two_processes_stop_together_and_continue_bit_for_bit(
    name: str, number: int, small_command: list[str], tmp_path: Path
) -> None:
    """One of them gets SIGTERM, and neither ends before the main rank has saved; or is killed, and
    the other ends in one line."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [*small_command, "--out", str(out)]
    (first, says), (second, output) = run(command, tmp_path, **{name: number})
    if number == signal.SIGTERM:
        assert (first, second) == (143, 143)
        assert "stopped by SIGTERM after step 3, which is saved in" in says
        assert "stopped" not in output
    else:
        assert (first, second) == ((-9, 1) if name == "main" else (1, -9))
        assert "Traceback" not in says + output
    for folder in (out, whole):
        for code, output in run([*small_command, "--out", str(folder)], tmp_path):
            assert code == 0, output
    assert_same_run(out, whole)


def test_two_processes_end_when_the_run_diverges(small_command: list[str], tmp_path: Path) -> None:
    """The main rank says it."""
    command = [*small_command, "--out", str(tmp_path / "run")]
    command[command.index("--lr") + 1] = "1e30"
    (first, says), (second, output) = run(command, tmp_path)
    assert (first, second) == (1, 1)
    assert says.splitlines()[-1].startswith("error: the ")
    assert "Traceback" not in says + output


def test_a_machine_with_too_few_gpus_is_refused_by_every_rank(monkeypatch) -> None:
    """The main one, which has a GPU, prints it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"), ranks.join():
        pass


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch) -> None:
    """Three ranks, four sequences."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch 4: expected a multiple of the 3"):
        check(Options(model="tiny"), layout_of("tiny"), torch.device("cpu"))
