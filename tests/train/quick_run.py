"""The experiment's command in processes of their own, for tests that start, stop and kill it.

A fork server imports everything once; each command is a fork of it. Every step is logged and saved,
evaluations are two tokens of one sample per prompt, and there is no report. The tokens of a pattern
are found once, and no write waits for the disk: a kill loses nothing that a process has written.
"""

import json
import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from model.tokenizer import load_tokenizer
from train import xfactor
from train.target_tokens import LETTER_X, matching

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.quick_run", "torch._dynamo"])
LIMIT = 120  # seconds that no command here comes near
PATTERN = "^[Xx]$"  # two tokens
SHORT = {"FULL": 1, "SHORT": 1, "LOG_EVERY": 1, "SAVE_EVERY": -1.0}
Function = Callable[[list[str]], None]
find = cache(matching)
for pattern in (PATTERN, LETTER_X):  # for the forks too
    find(load_tokenizer(), pattern)


def command(arguments: list[str], **short: float) -> None:
    """Run `python -m train.xfactor` with these arguments, on one thread: runs are compared.

    short: other values of SHORT.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        patch.multiple("train.evaluate", NEW_TOKENS=2),
        patch.multiple("train.run", **SHORT | short),
        patch.multiple("train.inputs", TEXTS=4, BATCH=2, TOKENS=16),
        patch.multiple(xfactor, write_report=lambda *_: [], summary=lambda *_: "", matching=find),
        patch.multiple("os", fsync=lambda descriptor: None),
        patch.multiple("sys", argv=["train.xfactor", *arguments]),
    ):
        try:
            xfactor.main()
        finally:
            torch.set_num_threads(threads)


def signalled(target: str, call: int, *numbers: int, **short: float) -> Function:
    """Return the command, which gets signals at the `call`-th call of the function `target`."""
    return partial(_signalled, target=target, call=call, numbers=numbers, short=short)


def start(arguments: list[str], log: Path, function: Function = command) -> BaseProcess:
    """Start the command with its output in `log`, or another function of such arguments."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, log))
    process.start()
    return process


def finish(process: BaseProcess, log: Path) -> tuple[int, str]:
    """Wait for it; return its exit status (minus the number of a killing signal) and output."""
    process.join(LIMIT)
    assert process.exitcode is not None, f"not done after {LIMIT} s: {log.read_text()}"
    return process.exitcode, log.read_text()


def run(arguments: list[str], log: Path, function: Function = command) -> tuple[int, str]:
    """Start it and wait for it."""
    return finish(start(arguments, log, function), log)


def changed(arguments: list[str], **options: str) -> list[str]:
    """Return the arguments with other values of options, or with more options."""
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    values |= {"--" + name.replace("_", "-"): value for name, value in options.items()}
    return [word for pair in values.items() for word in pair]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of log.jsonl without times; no step may occur twice or out of order."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(len(steps)))
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def losses(folder: Path) -> list[float]:
    """Return the logged loss of each step."""
    return [line["loss"] for line in logged(folder) if "loss" in line]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Compare all but times, bit for bit: log, samples, weights, Adam's state, names of files."""
    assert logged(folder) == logged(whole)
    for name in ("samples.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    got, expected = (torch.load(f / "state.pt", "cpu", weights_only=True) for f in (folder, whole))
    assert got["step"] == expected["step"]
    for part in ("model", "adam"):
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def _signalled(
    arguments: list[str], target: str, call: int, numbers: tuple[int, ...], short: dict[str, float]
) -> None:
    function, calls = pkgutil.resolve_name(target), []

    def with_signals(*args: Any, **options: Any) -> Any:
        calls.append(target)
        for number in numbers if len(calls) == call else ():
            signal.raise_signal(number)
        return function(*args, **options)

    with patch(target, with_signals):
        command(arguments, **short)


def _run(function: Function, arguments: list[str], log: Path) -> None:
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
