"""What does not fit a run on disk is refused in one line, and not a byte of it changes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import quick_run
from tests.train.quick_run import changed
from weights import load_weights, save_weights


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
    "another text": lambda s: s.update(text=torch.arange(99)),
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
    "half a state": ("state.pt", lambda data: data[: len(data) // 2]),
    "no state": ("state.pt", lambda data: None),
    "half a log": ("log.jsonl", lambda data: data[: len(data) // 2]),
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
