"""Several ranks on the CPU against one process; torchrun starts them once, forks elsewhere."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
import torch

from tests.train import quick_run
from tests.train.quick_run import assert_same_run, losses
from train import ranks
from train.xfactor import Options, check, get_batch
from weights import layout_of, load_weights

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def as_rank(arguments: list[str], rank: int, port: int, function: quick_run.Function) -> None:
    """Run the command as one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(arguments)


def run(arguments: list[str], folder: Path, *numbers: int) -> list[tuple[int, str]]:
    """Run the command on two ranks; the second may get a signal. Return exit codes and outputs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in (0, 1):
        function = quick_run.signalled("train.xfactor.get_batch", 3, *numbers[:rank])
        as_one = partial(as_rank, rank=rank, port=port, function=function)
        log = folder / f"log-{rank}"
        processes.append((quick_run.start(arguments, log, as_one), log))
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


def test_two_processes_stop_together_and_continue_bit_for_bit(small_command, tmp_path) -> None:
    """The second gets SIGTERM, and neither ends before the main rank has saved; or it is killed,
    and the main rank says so in one line."""
    outs = [tmp_path / name for name in ("whole", "stopped", "killed")]
    commands = [[*small_command, "--out", str(out)] for out in outs]
    (first, says), (second, output) = run(commands[1], tmp_path, SIGTERM)
    assert (first, second) == (143, 143)
    assert "stopped by SIGTERM after step 3, which is saved in" in says
    assert "stopped" not in output
    (first, says), (second, _) = run(commands[2], tmp_path, SIGKILL)
    assert (first, second) == (1, -SIGKILL)
    assert says.splitlines()[-1] == "error: another rank failed; see its error above"
    for command in commands:
        for code, output in run(command, tmp_path):
            assert code == 0, output
    for out in outs[1:]:
        assert_same_run(out, outs[0])


def test_a_machine_with_too_few_gpus_is_refused_by_every_rank(monkeypatch) -> None:
    """The main one, which has a GPU, prints it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"), ranks.join():
        pass


def test_each_rank_takes_its_rows_of_the_batch(monkeypatch) -> None:
    """In their order; a batch that they cannot share is refused."""
    whole, parts = get_batch(Options(), None, 0, CPU), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(get_batch(Options(), None, 0, CPU))
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch 4: expected a multiple of the 3"):
        check(Options(model="tiny"), layout_of("tiny"), CPU)
