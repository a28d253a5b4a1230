"""A run on disk: killed, stopped, without space, it goes on as if nothing had been.

The commands run in processes of their own (`quick_run`), on the CPU: the subject is the folder.
What is refused is in test_refused.py.
"""

import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from train.signals import Stopped, StopSignals

from model import GPT2
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, contents, has_step, logged
from weights import load_weights

KILLS = 20
RATE = "lr-0.01"  # the folder of the only rate


def assert_resumes_to_the_whole(out: Path, command: list[str], tmp_path: Path) -> None:
    """Two steps after what is there, against a run of as many steps that nothing has stopped."""
    done = (out / RATE / "metrics.jsonl").read_bytes().count(b'"loss"')
    log, steps = tmp_path / "log", ["--steps", str(done + 2)]
    code, output = quick_run.run(["--resume", str(out), *steps], log)
    assert code == 0, output
    whole = [*command, *steps, "--save-every", "0", "--out", str(tmp_path / "whole")]
    code, output = quick_run.run(whole, log)
    assert code == 0, output
    assert_same_run(out / RATE, tmp_path / "whole" / RATE)


def test_a_run_killed_twenty_times_is_the_run_that_was_never_stopped(
    small_command: list[str], tmp_path: Path
) -> None:
    """SIGKILL at random times, while starting or within a step or its save; each start goes on from
    the last step that was logged or the one before it, every step being saved."""
    out, log, at_random = tmp_path / "run", tmp_path / "log", random.Random(0)
    metrics = out / RATE / "metrics.jsonl"
    command = [*small_command, "--eval-every", "0"]
    quick_run.run([], log, print)  # the fork server is up
    before, began, span, resumptions = 0, time.monotonic(), 0.0, 0
    for kill in range(KILLS + 1):
        given = ["--resume", str(out)] if out.exists() else [*command, "--out", str(out)]
        process = quick_run.start([*given, "--steps", "1000"], log)
        if kill == 0:  # the first one is let run, to see how long a start takes
            quick_run.wait_until(lambda: has_step(out / RATE), process.is_alive)
            time.sleep(0.2)
            span = min(2.5, time.monotonic() - began)
        else:
            time.sleep(at_random.uniform(0.1, 1.1) * span)
        process.kill()
        code, output = quick_run.finish(process, log)
        assert code == -signal.SIGKILL, output
        if resumed := re.search(r"goes on after step (\d+)", output):
            assert int(resumed[1]) >= before - 1
            resumptions += 1
        before = metrics.read_bytes().count(b'"loss"')
    assert resumptions >= KILLS // 4
    assert_resumes_to_the_whole(out, command, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_saved_step(number, code, small_command, tmp_path) -> None:
    """The command it names then gives the run that was never stopped."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = [*small_command, "--eval-every", "0", "--save-every", "0"]
    process = quick_run.start([*command, "--steps", "1000", "--out", str(out)], log)
    quick_run.wait_until(lambda: has_step(out / RATE), process.is_alive)
    os.kill(process.pid, number)
    stopped, output = quick_run.finish(process, log)
    assert stopped == code, output
    assert f"stopped by {number.name} after step {len(logged(out / RATE))}, saved" in output
    assert f"--resume {out}" in output
    assert_resumes_to_the_whole(out, command, tmp_path)


def test_a_signal_that_no_step_obeyed_is_passed_on() -> None:
    """One that comes after the last step's look at it, while its save is written; to whom it would
    have gone before. One that was obeyed is not."""
    passed_on: list[int] = []

    def signalled(error: Exception | None = None) -> None:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            if error:
                raise error

    before = signal.signal(signal.SIGTERM, lambda number, frame: passed_on.append(number))
    try:
        signalled()
        assert passed_on == [signal.SIGTERM]
        with pytest.raises(Stopped):
            signalled(Stopped(signal.SIGTERM, 1))
        assert passed_on == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def command_on_a_full_disk(arguments: list[str]) -> None:
    """No file may grow beyond 20 MB: Adam's 26 MB do not fit, the weights' 13 MB do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    quick_run.command(arguments)


def test_a_full_disk_is_one_error_and_leaves_the_save_before(
    small_command, whole_run, tmp_path
) -> None:
    """A limit on the size of files stands for it; with space again, the run goes on."""
    out, log = tmp_path / "run", tmp_path / "log"
    code, output = quick_run.run([*small_command, "--steps", "4", "--out", str(out)], log)
    assert code == 0, output
    before = contents(out / RATE)
    code, output = quick_run.run(
        ["--resume", str(out), "--steps", "8"], log, command_on_a_full_disk
    )
    assert code == 1
    assert "error: cannot save step 5" in output.splitlines()[-1]
    assert "step 4 is the last one saved" in output.splitlines()[-1]
    after = contents(out / RATE)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if "safetensors" in name)
    code, output = quick_run.run(["--resume", str(out), "--steps", "8"], log)
    assert code == 0, output
    assert_same_run(out / RATE, whole_run)


def test_a_folder_that_is_removed_is_one_error_and_stays_removed(small_command, tmp_path) -> None:
    """In the middle of a run; nothing is written beside or in place of it."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*small_command, "--steps", "1000", "--out", str(out)], log)
    quick_run.wait_until((out / RATE / "model.safetensors").exists, process.is_alive)
    os.rename(out, tmp_path / "removed")
    code, output = quick_run.finish(process, log)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: cannot ")
    assert str(out / RATE) in output.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("steps", [8, 1], ids=["loss", "logits"])
def test_a_rate_that_diverges_is_one_error_and_leaves_the_others(
    steps: int, small_command, tmp_path
) -> None:
    """Its weights overflow, seen in the next step's loss or, after the last, in the logits of the
    evaluation. What is logged is finite, the other rate runs to its end, both are reported."""
    out, log = tmp_path / "run", tmp_path / "log"
    rates = ["--lr", "1e30", "1e-2", "--steps", str(steps), "--out", str(out)]
    code, output = quick_run.run([*small_command, *rates], log)
    assert code == 1
    became = "logits became NaN or infinite after" if steps == 1 else "loss became (nan|inf) at"
    kept = "no step was saved yet" if steps == 1 else r"step \d is the last one saved"
    error = rf"error: lr-1e\+30: the {became} step \d; {kept}"
    assert re.match(error, output.splitlines()[-1]), output
    assert all(loss < float("inf") for _, loss, _ in logged(out / "lr-1e+30"))
    assert len(logged(out / RATE)) == steps
    assert (out / "report.html").exists()


def test_transformers_loads_a_run(whole_run: Path) -> None:
    """The folder as it is; the logits are this model's."""
    from transformers import GPT2LMHeadModel  # here: each child process imports this file too

    tokens = torch.arange(1, 9)[None]
    expected = GPT2.from_state_dict(load_weights(whole_run))(tokens)
    theirs = GPT2LMHeadModel.from_pretrained(whole_run).eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
