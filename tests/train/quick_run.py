"""The experiment's command in a process of its own, soon there: for tests that start and kill it.

A fork server imports everything once; each command is a fork of it. Evaluations are short here: two
tokens of one sample, so that a run is all steps and saves.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch

import train.evaluate
from train.xfactor import main
from weights import load_weights

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.xfactor", "torch._dynamo"])  # seconds; from the root
LIMIT = 120  # seconds that no command here comes near


def start(arguments: list[str], log: Path, function=None) -> BaseProcess:
    """Start the command, its output in `log`; or another function of such arguments."""
    process = CONTEXT.Process(target=_run, args=(function or command, arguments, log))
    process.start()
    return process


def finish(process: BaseProcess, log: Path) -> tuple[int, str]:
    """Wait for it; its exit code, minus the signal's number if one killed it, and its output."""
    process.join(LIMIT)
    assert process.exitcode is not None, f"not done after {LIMIT} s: {log.read_text()}"
    return process.exitcode, log.read_text()


def run(arguments: list[str], log: Path, function=None) -> tuple[int, str]:
    return finish(start(arguments, log, function), log)


def command(arguments: list[str]) -> None:
    """`python -m train.xfactor` with these arguments, but for the length of evaluations."""
    with (
        patch.multiple(train.evaluate, NEW_TOKENS=2, SAMPLES=1),
        patch.object(sys, "argv", ["train.xfactor", *arguments]),
    ):
        main()


def wait_until(condition: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    """Return once the condition holds; it must come to hold while the process lives."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert is_alive(), "the process has ended before"
        assert time.monotonic() < deadline, f"not within {LIMIT} s"
        time.sleep(0.01)


def has_step(folder: Path) -> bool:
    """Whether a run has written a step down."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and b'"loss"' in metrics.read_bytes()


def assert_same_run(folder: Path, whole: Path) -> None:
    """Losses, samples and weights, bit for bit, and no file that the other has not."""
    assert logged(folder) == logged(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    expected = load_weights(whole)
    for name, p in load_weights(folder).items():
        assert torch.equal(p, expected[name]), name
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Turn one bit of a file around."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logged(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and mass of metrics.jsonl, with no step twice or out of order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "target_probability")
    steps = [tuple(line[name] for name in names) for line in lines if "loss" in line]
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1))
    return steps


def _run(function, arguments: list[str], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is the CPU's
    torch.set_num_threads(1)
    function(arguments)


if __name__ == "__main__":  # as torchrun starts it
    command([argument.format(rank=os.environ["RANK"]) for argument in sys.argv[1:]])
    print("threads left:", *(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")))
