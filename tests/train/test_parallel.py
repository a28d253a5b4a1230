"""Several ranks on the CPU against one process; torchrun starts them once, forks elsewhere."""

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.train import quick_run
from tests.train.quick_run import assert_same_run, has_step, losses
from train.inputs import check
from train.xfactor import Options
from weights import load_weights

ROOT = Path(__file__).parents[2]
RATE = "lr-0.01"
LONG = ["--steps", "1000", "--eval-every", "0"]


def as_rank(arguments: list[str]) -> None:
    """Run the command as one of two ranks."""
    rank, port, *arguments = arguments
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    quick_run.command([argument.replace("RANK", rank) for argument in arguments])


def start(arguments: list[str], folder: Path) -> list[BaseProcess]:
    """Start the command on two ranks, with their output in folder/0 and folder/1."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return [quick_run.start([r, port, *arguments], folder / r, as_rank) for r in "01"]


def run(arguments: list[str], folder: Path, kill: int | None = None) -> list[tuple[int, str]]:
    """Run it to its end, or until a step is logged and a rank killed; exit codes and outputs."""
    processes = start(arguments, folder)
    if kill is not None:
        out = Path(arguments[arguments.index("--out") + 1])
        quick_run.wait_until(lambda: has_step(out / RATE), processes[kill].is_alive)
        processes[kill].kill()
    return [quick_run.finish(processes[rank], folder / str(rank)) for rank in (0, 1)]


def test_two_processes_make_the_run_of_one(small_start: Path, tmp_path: Path) -> None:
    """Losses to 1e-5 and weights after five steps; Adam's rate bounds what rounding can do."""
    size = ["--weights", str(small_start), "--steps", "5", "--batch", "4", "--length", "16"]
    command = [*size, "--lr", "1e-3", "--out"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "tests.train.quick_run", *command, tmp_path / "2"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens are the goal") == 1  # the main rank alone prints
    assert done.stdout.count("threads left:") == 2
    assert "gloo" not in done.stdout  # else now and then a process aborts while it ends
    code, output = quick_run.run([*command, str(tmp_path / "1")], tmp_path / "log")
    assert code == 0, output
    one, two = (tmp_path / processes / "lr-0.001" for processes in "12")
    assert losses(two) == pytest.approx(losses(one), rel=0, abs=1e-5)
    assert len(losses(one)) == 5
    start, expected, got = map(load_weights, (small_start, one, two))
    for name, p in expected.items():
        torch.testing.assert_close(got[name], p, rtol=0, atol=2e-5, msg=name)
    assert (expected["wte.weight"] - start["wte.weight"]).abs().max() > 1e-3


def test_two_processes_that_are_stopped_resume_bit_for_bit(small_command, tmp_path: Path) -> None:
    """One of them gets SIGTERM, and neither ends before the main rank has saved."""
    out, whole, log = tmp_path / "stopped", tmp_path / "whole", tmp_path / "log"
    command = [*small_command, *LONG, "--save-every", "0"]
    processes = start([*command, "--out", str(out)], log)
    quick_run.wait_until(lambda: has_step(out / RATE), processes[0].is_alive)
    os.kill(processes[1].pid, signal.SIGTERM)
    for rank, process in enumerate(processes):
        code, output = quick_run.finish(process, log / str(rank))
        assert code == 143, output
        assert ("stopped by SIGTERM after step" in output) == (rank == 0)
    steps = ["--steps", str(len(losses(out / RATE)) + 2)]
    for arguments in (["--resume", str(out)], [*command, "--out", str(whole)]):
        for code, output in run([*arguments, *steps], log):
            assert code == 0, output
    assert_same_run(out / RATE, whole / RATE)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_and_the_run_resumes(
    killed: int, small_command, tmp_path: Path
) -> None:
    """In one line; the steps that were saved, and two more, are those of a run never stopped."""
    out, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    results = run([*small_command, *LONG, "--out", str(out)], log, killed)
    assert results[killed][0] == -signal.SIGKILL
    code, output = results[1 - killed]
    assert code == 1
    assert output.splitlines()[-1].startswith(f"error: rank {1 - killed} of 2 ended because")
    steps = ["--steps", str(len(losses(out / RATE)) + 2), "--eval-every", "0"]
    for arguments in (["--resume", str(out)], [*small_command, "--out", str(whole)]):
        for code, output in run([*arguments, *steps], log):
            assert code == 0, output
    assert_same_run(out / RATE, whole / RATE)


def test_two_processes_end_a_rate_that_diverges_and_run_the_next(
    small_command: list[str], tmp_path: Path
) -> None:
    """The main rank alone sees it, and the other must learn of it."""
    rates = ["--lr", "1e30", "1e-2", "--out", str(tmp_path / "run")]
    (first, says), (second, output) = run([*small_command, *rates], tmp_path / "log")
    assert (first, second) == (1, 1)
    assert says.splitlines()[-1].startswith("error: lr-1e+30: the loss became")
    assert output.startswith("error: lr-1e+30: the main rank says why; step")
    assert len(losses(tmp_path / "run" / RATE)) == 8
    assert (tmp_path / "run" / "report.html").exists()


def test_an_error_of_one_process_ends_all_with_its_message(small_start, tmp_path: Path) -> None:
    """The second one cannot read its text; the first would wait for it forever."""
    (tmp_path / "text-0").write_text("The Mole had been working very hard all the morning. " * 9)
    command = ["--weights", str(small_start), "--length", "16", "--out", str(tmp_path / "out")]
    (first, _), (second, output) = run(
        [*command, "--inputs", str(tmp_path / "text-RANK")], tmp_path / "log"
    )
    assert (first, second) == (1, 1)
    assert f"error: --inputs {tmp_path / 'text-1'}" in output
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch) -> None:
    """Three ranks, four sequences."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"--batch 4 is not divisible by 3 ranks"):
        check(Options(model="tiny"), torch.device("cpu"))
