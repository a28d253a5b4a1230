"""A run that is stopped, killed or out of space: the same command ends with the run never stopped.

Commands run in processes of their own (`quick_run`). What a folder refuses is in test_refused.py,
every moment of a save in test_saves.py.
"""

import random
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, changed, losses, signalled
from train.command import SIGNALS
from weights import load_weights


@pytest.fixture
def command(small_command: list[str], tmp_path: Path) -> list[str]:
    return [*small_command, "--out", str(tmp_path / "run")]


def assert_continues(command: list[str], whole: Path, said: str = "") -> None:
    """Give the command again: it says where it goes on, and ends with the whole run."""
    out = Path(command[-1])
    code, output = quick_run.run(command, out.with_name("log"))
    assert code == 0, output
    assert said in output
    assert_same_run(out, whole)


def test_a_run_killed_at_random_moments_is_the_run_that_was_never_stopped(
    command: list[str], whole_run: Path, tmp_path: Path
) -> None:
    """SIGKILL while the command starts, in a step, a save or an evaluation; five times."""
    log, at_random = tmp_path / "log", random.Random(0)
    began, kills = time.monotonic(), 0
    quick_run.run(changed(command, out=str(tmp_path / "first")), log)
    span = time.monotonic() - began
    while kills < 5:
        process = quick_run.start(command, log)
        time.sleep(at_random.uniform(0, span))
        process.kill()
        code, output = quick_run.finish(process, log)
        assert code in (0, -signal.SIGKILL), output
        kills += code != 0
    assert_continues(command, whole_run)


MOMENTS = {  # the call of a function at which the signal comes, and the step that is then saved
    "loading": ("train.inputs.load_start", 1, None),
    "the first evaluation": ("train.run.evaluate", 1, None),
    "a step": ("train.xfactor.get_batch", 3, 3),
    "a save": ("torch.save", 2, 2),
    "a log": ("train.folder.append", 3, 1),
    "an evaluation": ("train.run.evaluate", 2, 2),
    "the last save": ("torch.save", 4, 4),
    "the last evaluation": ("train.run.evaluate", 3, 4),
    "the model's file": ("train.run.save_file", 1, None),
    "the report": ("tests.train.quick_run.report", 1, None),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [(moment, signal.SIGTERM) for moment in MOMENTS] + [("a step", n) for n in SIGNALS[::2]],
)
def test_a_signal_ends_the_run_in_one_line_and_loses_nothing(
    moment: str, number: int, command: list[str], whole_run: Path, tmp_path: Path
) -> None:
    """After the step, saved, with the line that says how to go on; the same command does."""
    target, call, step = MOMENTS[moment]
    code, output = quick_run.run(command, tmp_path / "log", signalled(target, call, number))
    assert code == 128 + number, output
    line = f"stopped by {signal.Signals(number).name}"
    if step:
        line += f" after step {step}, which is saved in {command[-1]}; the same command continues"
    assert output.splitlines()[-1].startswith(line)
    assert output.count("stopped by") == 1
    assert "Traceback" not in output
    assert_continues(command, whole_run, f"after step {step}\n" if step in (1, 2, 3) else "")


@pytest.mark.parametrize("moment", ["a step", "a save"])
def test_a_second_signal_ends_the_run_at_once(
    moment: str, command: list[str], whole_run: Path, tmp_path: Path
) -> None:
    """Within the step or the save, which is lost; the save before it is kept."""
    target, call, _ = MOMENTS[moment]
    stopped = signalled(target, call, signal.SIGINT, signal.SIGTERM)
    code, output = quick_run.run(command, tmp_path / "log", stopped)
    assert code == 143, output
    assert output.endswith("\nstopped by SIGTERM\n")
    assert_continues(command, whole_run, f"continuing after step {call - 1}")


def between_two_logs(arguments: list[str]) -> None:
    """Run the command, which looks at its losses every ten steps; the signal comes in the first."""
    with patch.dict(quick_run.SHORT, LOG_EVERY=10):
        signalled("train.xfactor.get_batch", 1, signal.SIGINT)(arguments)


def test_a_stop_does_not_wait_for_the_next_log(command, whole_run, tmp_path) -> None:
    _, output = quick_run.run(command, tmp_path / "log", between_two_logs)
    assert "stopped by SIGINT after step 1, which is saved in " in output
    assert_continues(command, whole_run, "continuing after step 1")


def without_saves(arguments: list[str]) -> None:
    """Run the command, which logs each step, saves none and dies in the fourth."""
    with patch.dict(quick_run.SHORT, SAVE_EVERY=3600.0):
        signalled("train.xfactor.get_batch", 4, signal.SIGKILL)(arguments)


def test_a_run_that_was_not_saved_starts_over_and_says_so(command, whole_run, tmp_path) -> None:
    code, output = quick_run.run(command, tmp_path / "log", without_saves)
    assert code == -signal.SIGKILL, output
    again = "continuing after step 0; 3 more were logged and are done again\n"
    assert_continues(command, whole_run, again)


def test_a_complete_run_says_so(small_command: list[str], whole_run: Path, copy: Path) -> None:
    """Nothing of it changes; its folder has moved."""
    said = f"the run in {copy} is complete\n"
    assert_continues([*small_command, "--out", str(copy)], whole_run, said)


def test_a_run_may_grow(command: list[str], copy: Path) -> None:
    """More steps, and other evaluations of them: its losses are those of a long run."""
    longer = changed(command, steps="6", eval_every="3")
    quick_run.command(longer)
    quick_run.command(changed(longer, out=str(copy)))
    assert losses(copy) == losses(Path(command[-1]))
    assert len(losses(copy)) == 6
    evaluated = [x["step"] for x in quick_run.logged(copy) if "evaluation" in x]
    assert evaluated == [0, 2, 4, 6]


def command_on_a_full_disk(arguments: list[str]) -> None:
    """Let no file grow beyond 20 MB; a state has 39 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    quick_run.command(arguments)


def test_a_full_disk_is_one_line_and_keeps_the_last_save(command, whole_run, tmp_path) -> None:
    """With space again, the same command continues."""
    stopped = signalled("torch.save", 2, signal.SIGINT)
    quick_run.run(command, tmp_path / "log", stopped)
    before = (tmp_path / "run" / "state.pt").read_bytes()
    code, output = quick_run.run(command, tmp_path / "log", command_on_a_full_disk)
    assert code == 1
    error = f"error: cannot write to {command[-1]}: [Errno 27] File too large; "
    assert output.splitlines()[-1].startswith(error)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert_continues(command, whole_run, "after step 2; 1 more were logged and are done again")


@pytest.mark.parametrize("steps", [4, 1], ids=["loss", "logits"])
def test_a_run_that_diverges_ends_in_one_line(steps: int, command: list[str]) -> None:
    """What is logged and saved is finite."""
    with pytest.raises(SystemExit) as ended:
        quick_run.command(changed(command, lr="1e30", steps=str(steps)))
    what = r"loss became (nan|inf) at step \d" if steps == 4 else "logits became NaN at step 1"
    kept = "the save of step 1 is kept. Try a smaller --lr, with another --out"
    assert re.fullmatch(f"error: the {what}; {kept}", str(ended.value))
    assert all(loss < float("inf") for loss in losses(Path(command[-1])))


def test_transformers_opens_a_run(whole_run: Path) -> None:
    """The folder as it is: the model's logits and the tokenizer's ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # each child imports this file

    text = "The fox said: “Next time, bring an axe!”<|endoftext|>"
    ids = load_tokenizer().encode(text)
    assert AutoTokenizer.from_pretrained(whole_run)(text)["input_ids"] == ids
    tokens = torch.tensor([ids])
    theirs: Any = AutoModelForCausalLM.from_pretrained(whole_run)
    expected = GPT2.from_state_dict(load_weights(whole_run))(tokens)
    torch.testing.assert_close(theirs.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
