"""Several processes as torchrun starts them, on the CPU, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT2, GPT2Config
from train.options import Options, check
from weights import load_weights, save_weights

ROOT = Path(__file__).parent.parent
STEPS = 5


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model over the tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1))
    save_weights(model.state_dict(), folder)
    return folder


def launch(processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """The command under torchrun, with short evaluations."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, "-m", *torchrun, "tests/quick_run.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_make_the_run_of_one(start: Path, tmp_path: Path) -> None:
    """Losses to 1e-5 and weights after five steps; Adam's rate bounds what rounding can do."""
    size = ["--weights", str(start), "--steps", str(STEPS), "--batch", "4", "--length", "16"]
    curves, weights = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = launch(processes, [*size, "--lr", "1e-3", "--out", str(out)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tokens are the goal") == 1  # the first process alone prints
        run = out / "lr-0.001"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([(x["loss"], x["mass"]) for x in lines if "loss" in x])
        weights.append(load_weights(run))
    one, two = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    assert one.shape == (STEPS, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    for name, p in weights[0].items():
        torch.testing.assert_close(weights[1][name], p, rtol=0, atol=2e-5, msg=name)
    moved = weights[0]["wte.weight"] - load_weights(start)["wte.weight"]
    assert moved.abs().max() > 1e-3


def test_an_error_of_one_process_ends_all_with_its_message(start: Path, tmp_path: Path) -> None:
    """The second process cannot read its text; the first would wait for it forever."""
    text = tmp_path / "text-{rank}"
    (tmp_path / "text-0").write_text("The Mole had been working very hard all the morning. " * 9)
    out = ["--out", str(tmp_path / "out")]
    done = launch(2, ["--weights", str(start), "--length", "16", "--inputs", str(text), *out])
    assert done.returncode != 0
    assert f"error: --inputs {tmp_path / 'text-1'}" in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused_before_the_start(tmp_path: Path) -> None:
    """Three processes, four sequences."""
    with pytest.raises(ValueError, match=r"--batch 4 is not divisible by 3 processes"):
        check(Options(model="gpt2", out=tmp_path), processes=3)
