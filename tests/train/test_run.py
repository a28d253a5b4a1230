"""A run that is stopped, killed or out of space: the same command ends with the run never stopped.

What does not fit a run on disk is refused in one line, and not a byte of it changes. Every moment
of a save is in test_saves.py.
"""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import torch

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, changed, losses, signalled
from weights import load_weights, save_weights


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


MOMENTS = {  # the call of a function at which the signal comes, and the step that is then saved
    "loading": (SIGINT, signalled("train.inputs.load_start", 1, SIGINT), None),
    "the first evaluation": (SIGTERM, signalled("train.run.evaluate", 1, SIGTERM), None),
    "a log": (SIGHUP, signalled("train.folder.append", 3, SIGHUP), 1),
    "a step, long before the next log and save":
        (SIGINT, signalled("train.xfactor.get_batch", 1, SIGINT, LOG_EVERY=10, SAVE_EVERY=60), 1),
    "an evaluation": (SIGTERM, signalled("train.run.evaluate", 2, SIGTERM), 2),
    "the last save": (SIGTERM, signalled("torch.save", 4, SIGTERM), 4),
    "the model's file": (SIGTERM, signalled("train.run.save_file", 1, SIGTERM), None),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_the_run_in_one_line_and_loses_nothing(
    moment: str, command: list[str], whole_run: Path, tmp_path: Path
) -> None:
    """After the step, saved, with the line that says how to go on; the same command does."""
    number, function, step = MOMENTS[moment]
    code, output = quick_run.run(command, tmp_path / "log", function)
    assert code == 128 + number, output
    line = f"stopped by {Signals(number).name}"
    if step:
        line += f" after step {step}, which is saved in {command[-1]}; the same command continues"
    assert output.splitlines()[-1].startswith(line)
    assert output.count("stopped by") == 1
    assert "Traceback" not in output
    assert_continues(command, whole_run, f"after step {step}\n" if step in (1, 2) else "")


def test_a_second_signal_ends_the_run_at_once(command, whole_run, tmp_path) -> None:
    """Within a save, which is lost; the save before it is kept."""
    stopped = signalled("torch.save", 2, SIGINT, SIGTERM)
    code, output = quick_run.run(command, tmp_path / "log", stopped)
    assert code == 143, output
    assert output.endswith("\nstopped by SIGTERM\n")
    assert_continues(command, whole_run, "continuing after step 1")


def test_a_run_that_was_killed_before_a_save_starts_over(command, whole_run, tmp_path) -> None:
    """And says so. No save was due in the three steps before."""
    killed = signalled("train.xfactor.get_batch", 4, SIGKILL, SAVE_EVERY=3600.0)
    code, output = quick_run.run(command, tmp_path / "log", killed)
    assert code == -SIGKILL, output
    said = "continuing after step 0; 3 more were logged and are done again\n"
    assert_continues(command, whole_run, said)


def test_a_complete_run_says_so(small_command: list[str], whole_run: Path, copy: Path) -> None:
    """Nothing of it changes; its folder has moved, and half a line of the log was cut off."""
    with open(copy / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    said = f"the run in {copy} is complete\n"
    assert_continues([*small_command, "--out", str(copy)], whole_run, said)


def test_a_run_may_grow(command: list[str], tmp_path: Path) -> None:
    """More steps, and other evaluations of them, on the same text, which was sampled once."""
    short = changed(command, share="0.2", steps="2")
    longer = changed(short, steps="4", eval_every="3")
    quick_run.command(short)
    quick_run.command(longer)
    quick_run.command(changed(longer, out=str(tmp_path / "long")))
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    text = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["text"]
    assert len(text) == 4 * 16  # with a share, samples are the default
    evaluated = [x["step"] for x in quick_run.logged(tmp_path / "run") if "evaluation" in x]
    assert evaluated == [0, 2, 3, 4]


def command_on_a_full_disk(arguments: list[str]) -> None:
    """Let no file grow beyond 20 MB; a state has 39 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    quick_run.command(arguments)


def test_a_full_disk_is_one_line_and_keeps_the_last_save(command, whole_run, tmp_path) -> None:
    """With space again, the same command continues."""
    quick_run.command(changed(command, steps="2"))
    before = (tmp_path / "run" / "state.pt").read_bytes()
    code, output = quick_run.run(command, tmp_path / "log", command_on_a_full_disk)
    assert code == 1
    error = f"error: cannot write to {command[-1]}: [Errno 27] File too large; "
    assert output.splitlines()[-1].startswith(error)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert_continues(command, whole_run, "after step 2; 1 more were logged and are done again")


@pytest.mark.parametrize(
    ("steps", "lr", "error"),
    [
        ("4", "1e30", r"loss became (nan|inf) at step \d; the save of step 1 is kept"),
        ("1", "1e30", "logits became NaN at step 1; the save of step 1 is kept"),
        ("1", "1e39", "weights became NaN or infinite at step 1; no step was saved"),
    ],
)
def test_a_run_that_diverges_ends_in_one_line(steps, lr, error, command: list[str]) -> None:
    """What is logged and saved is finite."""
    with pytest.raises(SystemExit) as ended:
        quick_run.command(changed(command, lr=lr, steps=steps))
    advice = "Try a smaller --lr, with another --out"
    assert re.fullmatch(rf"error: the {error}\. {advice}", str(ended.value))
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


def assert_refused(arguments: list[str], message: str, folder: Path) -> None:
    """Run the command in this process: one short line with the message; the folder stays."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as raised:
        quick_run.command(arguments)
    error = str(raised.value)
    assert re.fullmatch(f"error: .*{re.escape(message)}.*", error)  # one line
    assert len(error) < 500
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_another_value_of_an_option_that_matters(small_command, whole_run: Path) -> None:
    """It is named, with the value of the run."""
    others = {"lr": "1e-3", "tokens": "X", "batch": "4", "seed": "1", "mass": "0.9",
              "share": "0.2", "inputs": "samples", "dtype": "bfloat16", "loss": "unfused",
              "model": "tiny", "steps": "3"}  # fewer than are done # fmt: skip
    for option, value in others.items():
        words = changed(small_command, out=str(whole_run), **{option: value})
        assert_refused(words, f"--{option} ", whole_run)


def test_options_may_change_until_a_step_is_logged(small_command, copy: Path) -> None:
    """A batch that did not fit the memory must not occupy the folder."""
    for path in copy.iterdir():
        if path.name != "config.json":
            path.unlink()
    quick_run.command(changed(small_command, mass="0.9", out=str(copy)))
    config = json.loads((copy / "config.json").read_text())["xfactor"]
    assert config["options"]["mass"] == 0.9


def test_another_start_model_or_text_is_refused_from_the_first_logged_step_on(
    small_command: list[str], tmp_path: Path
) -> None:
    """Saved or not: a bit of the model, a word of the text."""
    start, text, out = (tmp_path / name for name in ("start", "text", "out"))
    shutil.copytree(small_command[1], start)
    text.write_text("The Mole had been working very hard all the morning.")
    command = changed(small_command, model=str(start), inputs=str(text), out=str(out), steps="1")
    quick_run.command(command)
    text.write_text("The Mole had been working very hard all the evening.")
    assert_refused(command, f"the text of the run in {out} has changed", out)
    for name in ("state.pt", "model.safetensors"):
        (out / name).unlink()
    weights = load_weights(start)
    weights["ln_f.bias"][0] += 1e-3
    save_weights(weights, start)
    assert_refused(command, f"the start of the run in {out} has changed", out)


class Evil:
    """A pickle of this runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('it ran')",)


def adam(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Any], object]:
    """Return a change of one part of Adam's state of every parameter."""
    return lambda s: [of_p.update({name: change(of_p[name])}) for of_p in s["adam"].values()]


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "code": lambda s: s.update(text=Evil()),
    "a G that is none": lambda s: s.update(g="x"),
    "a weight that is NaN": lambda s: s["model"]["ln_f.bias"].fill_(torch.nan),
    "a negative square": adam("exp_avg_sq", lambda x: -x - 1),
    "an infinite square": adam("exp_avg_sq", lambda x: x + torch.inf),
    "a mean that is NaN": adam("exp_avg", lambda x: x * torch.nan),
    "a mean's shape": adam("exp_avg", lambda x: x.flatten()[:1].clone()),
    "Adam's step": adam("step", lambda x: x - 1),
    "step -1 in all": lambda s: s.update(step=-1) or adam("step", lambda x: x * 0 - 1)(s),
}
FILES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "no state": ("state.pt", lambda data: None),
    "a log twice": ("log.jsonl", lambda data: data + data),
    "a step that is text": ("log.jsonl", lambda data: b'{"step": "x", "loss": 1.0}\n' + data),
    "a deep nest": ("samples.jsonl", lambda data: b"[" * 50_000 + b"\n" + data),
    "half a config": ("config.json", lambda data: data[: len(data) // 2]),
    "options that are none": ("config.json", lambda data: b'{"xfactor": {"options": 7}}'),
    "no config": ("config.json", lambda data: None),
}


@pytest.mark.parametrize("case", [*STATES, *FILES])
def test_a_file_that_is_damaged_or_hostile(case: str, small_command, copy: Path) -> None:
    """The line names it, or the folder."""
    if case in STATES:
        state = torch.load(copy / "state.pt", weights_only=True)
        STATES[case](state)
        torch.save(state, copy / "state.pt")
    else:
        name, damage = FILES[case]
        data = damage((copy / name).read_bytes())
        (copy / name).unlink()
        if data is not None:
            (copy / name).write_bytes(data)
    assert_refused(changed(small_command, out=str(copy), steps="6"), str(copy), copy)
