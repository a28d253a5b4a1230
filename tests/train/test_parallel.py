"""Several processes as torchrun starts them, on the CPU, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.options import Options, check

from tests.train import quick_run
from tests.train.quick_run import assert_same_run, has_step
from weights import load_weights

ROOT = Path(__file__).parents[2]
STEPS = 5


def start(processes: int, arguments: list[str]) -> subprocess.Popen:
    """The command under torchrun, with short evaluations."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, "tests/train/quick_run.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """That, to its end."""
    process = start(processes, arguments)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_two_processes_make_the_run_of_one(small_start: Path, tmp_path: Path) -> None:
    """Losses to 1e-5 and weights after five steps; Adam's rate bounds what rounding can do."""
    size = ["--weights", str(small_start), "--steps", str(STEPS), "--batch", "4", "--length", "16"]
    curves, weights = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = launch(processes, [*size, "--lr", "1e-3", "--out", str(out)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tokens are the goal") == 1  # the first process alone prints
        assert done.stdout.count("threads left:") == processes
        assert "gloo" not in done.stdout  # else now and then a process aborts while it ends
        run = out / "lr-0.001"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([(x["loss"], x["target_probability"]) for x in lines if "loss" in x])
        weights.append(load_weights(run))
    one, two = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    assert one.shape == (STEPS, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    for name, p in weights[0].items():
        torch.testing.assert_close(weights[1][name], p, rtol=0, atol=2e-5, msg=name)
    moved = weights[0]["wte.weight"] - load_weights(small_start)["wte.weight"]
    assert moved.abs().max() > 1e-3


def test_two_processes_that_are_stopped_go_on_bit_for_bit(
    small_command: list[str], tmp_path: Path
) -> None:
    """torchrun passes SIGTERM to both; neither ends before the first has saved."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [*small_command, "--save-every", "0", "--eval-every", "0"]
    process = start(2, [*command, "--steps", "1000", "--out", str(out)])
    quick_run.wait_until(lambda: has_step(out / "lr-0.01"), lambda: process.poll() is None)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in stderr, stderr
    steps = ["--steps", str(len(quick_run.logged(out / "lr-0.01")) + 2)]
    for arguments in (["--resume", str(out)], [*command, "--out", str(whole)]):
        done = launch(2, [*arguments, *steps])
        assert done.returncode == 0, done.stderr
    assert_same_run(out / "lr-0.01", whole / "lr-0.01")


def test_two_processes_end_a_rate_that_diverges_and_go_on_with_the_next(
    small_command: list[str], tmp_path: Path
) -> None:
    """The first process alone sees it, and the others must learn of it."""
    rates = ["--lr", "1e30", "1e-2", "--out", str(tmp_path)]
    done = launch(2, [*small_command, *rates])
    assert done.returncode != 0
    assert "error: lr-1e+30: the loss became" in done.stderr
    assert len(quick_run.logged(tmp_path / "lr-0.01")) == 8
    assert (tmp_path / "report.html").exists()


def test_an_error_of_one_process_ends_all_with_its_message(
    small_start: Path, tmp_path: Path
) -> None:
    """The second process cannot read its text; the first would wait for it forever."""
    text = tmp_path / "text-{rank}"
    (tmp_path / "text-0").write_text("The Mole had been working very hard all the morning. " * 9)
    out = ["--out", str(tmp_path / "out")]
    done = launch(2, ["--weights", str(small_start), "--length", "16", "--inputs", str(text), *out])
    assert done.returncode != 0
    assert f"error: --inputs {tmp_path / 'text-1'}" in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused_before_the_start(tmp_path: Path) -> None:
    """Three processes, four sequences."""
    with pytest.raises(ValueError, match=r"--batch 4 is not divisible by 3 processes"):
        check(Options(model="gpt2", out=tmp_path), processes=3)
