"""The experiment's command in processes of their own, for tests that start, stop and kill it.

A fork server imports everything once; each command is a fork of it. Evaluations are short: two
tokens of one sample per prompt, so that a run is all steps and saves.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import train.evaluate
import train.report.figures
from train.xfactor import main
from weights import load_weights

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.xfactor", "torch._dynamo", "train.report.figures"])
LIMIT = 120  # seconds that no command here comes near


def start(arguments: list[str], log: Path, function=None) -> BaseProcess:
    """Start the command with its output in `log`, or another function of such arguments."""
    process = CONTEXT.Process(target=_run, args=(function or command, arguments, log))
    process.start()
    return process


def finish(process: BaseProcess, log: Path) -> tuple[int, str]:
    """Wait for it; return its exit status (minus the number of a killing signal) and output."""
    process.join(LIMIT)
    assert process.exitcode is not None, f"not done after {LIMIT} s: {log.read_text()}"
    return process.exitcode, log.read_text()


def run(arguments: list[str], log: Path, function=None) -> tuple[int, str]:
    """Start it and wait for it."""
    return finish(start(arguments, log, function), log)


def command(arguments: list[str]) -> None:
    """Run `python -m train.xfactor` with these arguments; short evaluations, empty pictures."""
    with (
        patch.object(train.report.figures, "draw", lambda *_: b""),
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
    """Return whether a run has logged a step."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and b'"loss"' in metrics.read_bytes()


def assert_same_run(folder: Path, whole: Path) -> None:
    """Compare everything but times: logs, samples and weights bit for bit, and the files' names."""
    assert logged(folder) == logged(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    expected = load_weights(whole)
    for name, p in load_weights(folder).items():
        assert torch.equal(p, expected[name]), name
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    assert {p.name for p in folder.parent.iterdir()} == {p.name for p in whole.parent.iterdir()}


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times; no step may occur twice or out of order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def losses(folder: Path) -> list[float]:
    """Return the logged loss of each step."""
    return [line["loss"] for line in logged(folder) if "loss" in line]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _run(function, arguments: list[str], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is the CPU's
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored if the tests run in the background
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    signal.alarm(LIMIT)  # a test that fails leaves no process behind
    function(arguments)


if __name__ == "__main__":  # as torchrun starts it
    command(sys.argv[1:])
    print("threads left:", *(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")))
