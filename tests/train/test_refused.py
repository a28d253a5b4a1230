"""What does not fit a run on disk is refused in one line, and not a byte of it changes."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import quick_run
from tests.train.quick_run import changed, contents
from weights import load_weights, save_weights

OPTIONS = {"lr": "1e-3", "tokens": "X", "batch": "4", "seed": "1", "mass": "0.9", "share": "0.2",
           "inputs": "samples", "dtype": "bfloat16", "loss": "unfused", "model": "tiny",
           "steps": "3"}  # fewer than are done # fmt: skip


def assert_refused(arguments: list[str], message: str, folder: Path) -> None:
    """Run the command in this process: one short line with the message; the folder stays."""
    before = contents(folder)
    with pytest.raises(SystemExit) as raised:
        quick_run.command(arguments)
    error = str(raised.value)
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert len(error) < 500
    assert contents(folder) == before


@pytest.mark.parametrize("option", OPTIONS)
def test_another_value_of_an_option_that_matters(option: str, small_command, copy: Path) -> None:
    """It is named, with the value of the run."""
    words = changed(small_command, out=str(copy), **{option: OPTIONS[option]})
    assert_refused(words, f"error: --{option} ", copy)


def test_options_may_change_until_a_step_is_logged(small_command, copy: Path) -> None:
    """A batch that did not fit the memory must not occupy the folder."""
    for path in copy.iterdir():
        if path.name != "config.json":
            path.unlink()
    quick_run.command(changed(small_command, mass="0.9", out=str(copy)))
    config = json.loads((copy / "config.json").read_text())["xfactor"]
    assert config["options"]["mass"] == 0.9


@pytest.mark.parametrize("saved", [True, False])
def test_another_start_model_or_text_is_refused_from_the_first_logged_step_on(
    saved: bool, small_command: list[str], tmp_path: Path
) -> None:
    """Saved or not: a bit of the model, a word of the text."""
    start, text, out = (tmp_path / name for name in ("start", "text", "out"))
    shutil.copytree(small_command[1], start)
    text.write_text("The Mole had been working very hard all the morning.")
    command = changed(small_command, model=str(start), inputs=str(text), out=str(out))
    quick_run.command(command)
    if not saved:
        for name in ("state.pt", "model.safetensors"):
            (out / name).unlink()
    weights = load_weights(start)
    weights["ln_f.bias"][0] += 1e-3
    save_weights(weights, start)
    assert_refused(command, f"the start of the run in {out} has changed", out)
    shutil.copytree(small_command[1], start, dirs_exist_ok=True)
    text.write_text("The Mole had been working very hard all the evening.")
    assert_refused(command, f"the text of the run in {out} has changed", out)


class Evil:
    """A pickle of this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/evil-pickle",)


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return a damage that changes what state.pt holds."""

    def damage(data: bytes) -> bytes:
        content = torch.load(io.BytesIO(data), weights_only=True)
        change(content)
        torch.save(content, file := io.BytesIO())
        return file.getvalue()

    return damage


def adam(**changes: Callable[[torch.Tensor], object]) -> Callable[[bytes], bytes]:
    """Return a damage that changes Adam's state of each parameter."""

    def change(content: dict[str, Any]) -> None:
        for of_p in content["adam"].values():
            of_p |= {name: f(of_p[name]) for name, f in changes.items()}

    return state(change)


def config(**changes: Any) -> Callable[[bytes], bytes]:
    """Return a damage that changes what config.json holds under "xfactor"."""

    def damage(data: bytes) -> bytes:
        content = json.loads(data)
        content["xfactor"] |= changes
        return json.dumps(content).encode()

    return damage


STEP = b'{"step": %s, "loss": 1.0}\n'
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "half a state": ("state.pt", lambda data: data[: len(data) // 2]),
    "no bytes": ("state.pt", lambda data: b""),
    "a pickle with code": ("state.pt", lambda data: pickle.dumps(Evil())),
    "code in a state": ("state.pt", state(lambda s: s.update(text=Evil()))),
    "a weight that is NaN": ("state.pt", state(lambda s: s["model"]["ln_f.bias"].fill_(torch.nan))),
    "a negative square": ("state.pt", adam(exp_avg_sq=lambda x: -x - 1)),
    "an infinite square": ("state.pt", adam(exp_avg_sq=lambda x: x + torch.inf)),
    "a mean that is NaN": ("state.pt", adam(exp_avg=lambda x: x * torch.nan)),
    "a mean's shape": ("state.pt", adam(exp_avg=lambda x: x.flatten()[:1].clone())),
    "no Adam": ("state.pt", state(lambda s: s.update(adam={}))),
    "Adam's step": ("state.pt", adam(step=lambda x: x - 1)),
    "step -1 in all": ("state.pt", adam(step=lambda x: x * 0 - 1)),
    "a huge step": ("state.pt", state(lambda s: s.update(step=10**30))),
    "a text that is none": ("state.pt", state(lambda s: s.update(text="abc"))),
    "another text": ("state.pt", state(lambda s: s.update(text=torch.arange(99)))),
    "a G that is none": ("state.pt", state(lambda s: s.update(g="x"))),
    "no state": ("state.pt", lambda data: None),
    "half a log": ("log.jsonl", lambda data: data[: len(data) // 2]),
    "no log": ("log.jsonl", lambda data: None),
    "a log twice": ("log.jsonl", lambda data: data + data),
    "a step that is text": ("log.jsonl", lambda data: STEP % b'"x"' + data),
    "a step below 0": ("log.jsonl", lambda data: STEP % b"-1" + data),
    "a deep nest": ("log.jsonl", lambda data: b"[" * 50_000 + b"\n" + data),
    "a huge number": ("log.jsonl", lambda data: STEP % (b"9" * 5000) + data),
    "samples of no step": ("samples.jsonl", lambda data: b'{"step": "x"}\n' + data),
    "half a config": ("config.json", lambda data: data[: len(data) // 2]),
    "a deep config": ("config.json", lambda data: b"[" * 50_000),
    "options that are none": ("config.json", config(options=7)),
    "no config": ("config.json", lambda data: None),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_file_that_is_damaged_or_hostile(case: str, small_command, copy: Path) -> None:
    """The line names it, or the folder."""
    name, damage = DAMAGES[case]
    data = damage((copy / name).read_bytes())
    if data is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(data)
    assert_refused(changed(small_command, out=str(copy), steps="6"), str(copy), copy)
    assert not Path("/tmp/evil-pickle").exists()


def test_a_last_line_that_a_kill_cut_off_is_written_again(
    small_command: list[str], whole_run: Path, copy: Path
) -> None:
    """After the steps that are saved, half a line of the log."""
    with open(copy / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    quick_run.command([*small_command, "--out", str(copy)])
    assert quick_run.logged(copy) == quick_run.logged(whole_run)
