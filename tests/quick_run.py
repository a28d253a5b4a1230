"""The experiment's command in a process of its own, soon there: for tests that start and kill it.

A fork server imports everything once; each command is a fork of it. Evaluations are short here: two
tokens of one sample, so that a run is all steps and saves.
"""

import json
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import train.evaluate
from train.xfactor import main

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
    train.evaluate.NEW_TOKENS, train.evaluate.SAMPLES = 2, 1
    sys.argv = ["train.xfactor", *arguments]
    main()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logged(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and mass of metrics.jsonl, with no step twice or out of order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"], line["mass"]) for line in lines if "loss" in line]
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1))
    return steps


def _run(function, arguments: list[str], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    function(arguments)


if __name__ == "__main__":  # as torchrun starts it
    command([argument.format(rank=os.environ["RANK"]) for argument in sys.argv[1:]])
