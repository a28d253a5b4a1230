"""A run on disk: killed, stopped or out of space, it resumes as if nothing had happened.

The commands run in processes of their own (`quick_run`), on the CPU: the subject is the folder.
What a resumption refuses is in test_refused.py, every moment of a save in test_saves.py.
"""

import os
import random
import re
import resource
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train.xfactor
from model import GPT2
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, contents, has_step, losses
from train.report.figures import LIGHT, colours
from train.report.runs import read_runs
from weights import load_weights

KILLS = 20
RATE = "lr-0.01"  # the folder of the only rate
LONG = ["--steps", "1000", "--eval-every", "0"]


def assert_resumes_to_the_whole(out: Path, command: list[str], tmp_path: Path) -> None:
    """Two steps after what is there, against a run of as many steps that nothing has stopped."""
    log, steps = tmp_path / "log", ["--steps", str(len(losses(out / RATE)) + 2)]
    whole = [*command, *steps, "--save-every", "0", "--out", str(tmp_path / "whole")]
    for arguments in (["--resume", str(out), *steps], whole):
        code, output = quick_run.run(arguments, log)
        assert code == 0, output
    assert_same_run(out / RATE, tmp_path / "whole" / RATE)


def test_a_run_killed_twenty_times_is_the_run_that_was_never_stopped(
    small_command: list[str], tmp_path: Path
) -> None:
    """SIGKILL at random times, while starting or within a step or its save; each start resumes from
    the last step that was logged or the one before it, as every step is saved."""
    out, log, at_random = tmp_path / "run", tmp_path / "log", random.Random(0)
    quick_run.run([], log, print)  # the fork server is up
    before, began, span, resumptions = 0, time.monotonic(), 0.0, 0
    for kill in range(KILLS + 1):
        given = ["--resume", str(out)] if kill else [*small_command, "--out", str(out)]
        process = quick_run.start([*given, *LONG], log)
        if kill == 0:  # the first one runs freely, to see how long a start takes
            quick_run.wait_until(lambda: has_step(out / RATE), process.is_alive)
            time.sleep(0.2)
            span = time.monotonic() - began
        else:
            time.sleep(at_random.uniform(0.1, 1.1) * span)
        process.kill()
        code, output = quick_run.finish(process, log)
        assert code == -signal.SIGKILL, output
        if resumed := re.search(rf"{RATE}: resumes after step (\d+)", output):
            assert int(resumed[1]) >= before - 1
            resumptions += 1
        before = (out / RATE / "metrics.jsonl").read_bytes().count(b'"loss"')
    assert resumptions >= KILLS // 4
    assert_resumes_to_the_whole(out, [*small_command, "--eval-every", "0"], tmp_path)


@pytest.mark.parametrize("number", train.console.SIGNALS)
def test_a_signal_ends_the_run_after_a_saved_step(number, small_command, tmp_path: Path) -> None:
    """The command it names then gives the run that was never stopped."""
    out, log = tmp_path / "a run", tmp_path / "log"
    command = [*small_command, *LONG, "--save-every", "0"]
    process = quick_run.start([*command, "--out", str(out)], log)
    quick_run.wait_until(lambda: has_step(out / RATE), process.is_alive)
    os.kill(process.pid, number)
    code, output = quick_run.finish(process, log)
    assert code == 128 + number, output
    assert (
        f"stopped by {number.name} after step {len(losses(out / RATE))}, which is saved" in output
    )
    assert f"--resume '{out}'" in output
    assert_resumes_to_the_whole(out, command, tmp_path)


def test_a_second_signal_ends_the_run_at_once(small_command, tmp_path: Path) -> None:
    """The first one is obeyed after the step, which here never ends."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*small_command, *LONG, "--out", str(out)], log, endless_step)
    quick_run.wait_until(lambda: log.exists() and "in a step" in log.read_text(), process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    code, output = quick_run.finish(process, log)
    assert code == 143
    assert output.endswith("in a step\nstopped by SIGTERM\n")  # before a step there is nothing


def endless_step(arguments: list[str]) -> None:
    """Run the command up to its first step."""

    def wait(*args: object) -> None:
        os.write(1, b"in a step\n")
        while True:
            time.sleep(0.01)

    with patch("train.xfactor.get_batch", wait):
        quick_run.command(arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_evaluation_leaves_nothing_behind(
    number, small_command, tmp_path: Path
) -> None:
    """It is announced; the signal ends it in one line, and the same command then works."""
    out, log = tmp_path / "new" / "run", tmp_path / "log"
    process = quick_run.start([*small_command, "--out", str(out)], log, endless_evaluation)
    announced = "evaluating the model before fine-tuning\n"
    quick_run.wait_until(lambda: log.exists() and announced in log.read_text(), process.is_alive)
    assert (out / RATE / "config.json").exists()
    os.kill(process.pid, number)
    code, output = quick_run.finish(process, log)
    assert code == 128 + number
    assert output.endswith(announced + f"stopped by {number.name}\n")
    assert not out.parent.exists()


def endless_evaluation(arguments: list[str]) -> None:
    """Run the command, the evaluations of which never end."""
    with patch("train.xfactor.evaluate", lambda *_: time.sleep(quick_run.LIMIT)):
        quick_run.command(arguments)


def test_a_kill_while_the_report_is_written(small_command, whole_run, tmp_path: Path) -> None:
    """The runs are complete; resuming them writes what is missing and changes nothing else."""
    out, log = tmp_path / "run", tmp_path / "log"
    code, output = quick_run.run([*small_command, "--out", str(out)], log, killed_in_the_report)
    assert code == -signal.SIGKILL, output
    code, output = quick_run.run(["--resume", str(out)], log)
    assert code == 0, output
    assert_same_run(out / RATE, whole_run)


def killed_in_the_report(arguments: list[str]) -> None:
    """Run the command, which dies when the third file of the report takes its place."""
    replace, files = os.replace, []

    def die_at_the_third(source: Path, target: Path) -> None:
        files.append(target)
        if len([file for file in files if Path(file).parent == Path(arguments[-1])]) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with patch("os.replace", die_at_the_third):
        quick_run.command(arguments)


def command_on_a_full_disk(arguments: list[str]) -> None:
    """Let no file grow beyond 20 MB: Adam's 26 MB do not fit, the weights' 13 MB do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    quick_run.command(arguments)


def test_a_full_disk_is_one_error_and_leaves_the_save_before(
    small_command, whole_run, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it; with space again, the run resumes."""
    out, log = tmp_path / "run", tmp_path / "log"
    code, output = quick_run.run([*small_command, "--steps", "4", "--out", str(out)], log)
    assert code == 0, output
    before = contents(out / RATE)
    given = ["--resume", str(out), "--steps", "8"]
    code, output = quick_run.run(given, log, command_on_a_full_disk)
    assert code == 1
    assert "error: cannot save step 5" in output.splitlines()[-1]
    assert "step 4 is the last one saved" in output.splitlines()[-1]
    after = contents(out / RATE)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if "safetensors" in name)
    code, output = quick_run.run(given, log)
    assert code == 0, output
    assert_same_run(out / RATE, whole_run)


def test_a_folder_that_is_removed_is_one_error_and_stays_removed(
    small_command, tmp_path: Path
) -> None:
    """In the middle of a run; nothing is written beside or in place of it."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*small_command, "--steps", "1000", "--out", str(out)], log)
    quick_run.wait_until((out / RATE / "checkpoint.safetensors").exists, process.is_alive)
    os.rename(out, tmp_path / "removed")
    code, output = quick_run.finish(process, log)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: cannot ")
    assert str(out / RATE) in output.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("steps", [8, 1], ids=["loss", "logits"])
def test_a_rate_that_diverges_is_one_error_and_leaves_the_others(
    steps: int, small_command, tmp_path: Path
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
    assert all(loss < float("inf") for loss in losses(out / "lr-1e+30"))
    assert len(losses(out / RATE)) == steps
    assert (out / "report.html").exists()


def test_rates_keep_their_order_when_resumed(small_command, tmp_path: Path) -> None:
    """1e-5 before 1e-3, as given, though the folders' names sort the other way."""
    out, log = tmp_path / "run", tmp_path / "log"
    rates = ["--lr", "1e-5", "1e-3", "--steps", "1", "--out", str(out)]
    outputs = []
    for arguments in ([*small_command, *rates], ["--resume", str(out), "--steps", "2"]):
        code, output = quick_run.run(arguments, log)
        assert code == 0, output
        outputs.append(output)
    for output in outputs:
        assert re.findall(r"^lr-(\S+): step", output, re.M) == ["1e-05", "0.001"]
    resumed = re.findall(r"^lr-(\S+): resumes after step 1$", outputs[1], re.M)
    assert resumed == ["1e-05", "0.001"]
    table = [line.split(",")[0] for line in (out / "table.csv").read_text().splitlines()]
    rows = [i for rate in ("1e-05", "0.001") for i, cell in enumerate(table) if rate in cell]
    assert rows == sorted(rows)
    runs = read_runs([out])
    assert [run.lr for run in runs] == [1e-5, 1e-3]
    first, second = colours(runs, LIGHT)
    as_given = read_runs([out / "lr-1e-05", out / "lr-0.001"])
    assert colours(as_given, LIGHT) == [first, second]
    assert first != second


def test_transformers_loads_a_run(whole_run: Path) -> None:
    """The folder as it is; the logits are this model's."""
    from transformers import GPT2LMHeadModel  # here: each child process imports this file too

    tokens = torch.arange(1, 9)[None]
    expected = GPT2.from_state_dict(load_weights(whole_run))(tokens)
    theirs = GPT2LMHeadModel.from_pretrained(whole_run).eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
