"""Whatever does not fit a run on disk is refused in one line, and not a byte of it changes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.train import quick_run
from tests.train.quick_run import assert_same_run, contents, has_step
from weights import load_weights, save_weights

RATE = "lr-0.01"
REFUSED = {
    "again": (["--out", "OUT"], "holds a run; choose another folder, or --resume"),
    "a folder in use": (["--out", "OUT/lr-0.01"], " and no run; choose a new or an empty folder"),
    "another folder": (["--resume", "OUT", "--out", "OUT/x"], "--out OUT/x: leave it out"),
    "fewer steps": (["--resume", "OUT", "--steps", "7"], "OUT has done 8 already; give more"),
    "a text": (["--resume", "OUT", "--inputs", "OUT/other/config.json"], "began with other inputs"),
    "sampled inputs": (["--resume", "OUT", "--inputs", "samples"], "began with other inputs"),
    "another rate": (["--resume", "OUT", "--lr", "1e-3"], "--lr: got (0.001,), but the run"),
    "another goal": (["--resume", "OUT", "--regex", "X"], "--regex"),
    "another batch": (["--resume", "OUT", "--batch", "4"], "--batch"),
    "other weights": (["--resume", "OUT", "--weights", "OUT/other"], "began with other weights"),
    "other tokens": (["--resume", "OUT", "--tokens", "OUT/lr-0.01/58"], "other target tokens"),
    "no run": (["--resume", "/nowhere"], "/nowhere: got no run there"),
}


@pytest.fixture
def copy(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder of the runs, to damage."""
    return shutil.copytree(whole_run.parent, tmp_path / "run")


def assert_refused(arguments: list[str], message: str, folder: Path) -> None:
    """Run the command in this process: one short line with the message; the folder stays."""
    before = contents(folder)
    with pytest.raises(SystemExit) as raised:
        quick_run.command(arguments)
    error = str(raised.value)
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert len(error) < 1000
    assert contents(folder) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_folder(case: str, small_command, copy: Path) -> None:
    """Options that the run there does not have; files whose content has changed a little."""
    (copy / RATE / "58").write_text("58\n")
    weights = load_weights(small_command[1])
    weights["ln_f.bias"][0] += 1e-3
    save_weights(weights, copy / "other")
    arguments, message = REFUSED[case]
    arguments = [a.replace("OUT", str(copy)) for a in arguments]
    assert_refused(arguments, message.replace("OUT", str(copy)), copy)


EDITS = {
    "an option": ('"batch": 2', '"batch": 4', "began with other options"),
    "a word": ('"steps": 8', '"steps": "many"', "config.json: --steps many"),
    "a huge number": ('"steps": 8', f'"steps": {10**400}', "less than or equal to 1000000000"),
    "a list": ('"letter": "X"', '"letter": ["X"]', "should be a valid string"),
    "infinity": ('"alpha": 1.0', '"alpha": Infinity', "finite number"),
    "a missing option": ('"seed": 0', '"seeds": 0', "'seed'"),
    "a missing key": ('"xfactor"', '"xfactors"', "config.json: KeyError 'xfactor'"),
    "no JSON": ('"batch": 2', '"batch" 2', "config.json: JSONDecodeError"),
    "a deep nest": ('"letter": "X"', f'"letter": {"[" * 20_000}', "config.json: RecursionError"),
    "another type": ('"options": {', '"options": 7, "rest": {', "config.json: TypeError"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_configuration_that_was_edited(case: str, copy: Path) -> None:
    """It no longer says what the run began with."""
    was, edited, message = EDITS[case]
    config = copy / RATE / "config.json"
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, edited))
    assert_refused(["--resume", str(copy)], message, copy)


MOMENT = "exp_avg.wpe.weight"
DAMAGES = {
    "a moment's shape": (MOMENT, lambda t: t[1:], "wpe.weight: got torch.float32 (127, 64)"),
    "a moment's dtype": (MOMENT, lambda t: t.half(), "got torch.float16 (128, 64), expected"),
    "a moment's value": (MOMENT, lambda t: t / 0, "wpe.weight: got values that are not finite"),
    "a weight's value": ("model.ln_f.bias", lambda t: t + torch.inf, "are not finite"),
    "a missing tensor": (MOMENT, lambda t: None, f"got no tensor '{MOMENT}'"),
    "an unknown tensor": ("x", lambda t: torch.ones(1), "got an unknown tensor 'x'"),
    "Adam's step": ("step.wpe.weight", lambda t: t - 1, "Adam's state is not that of step 8"),
    "the generator": ("generator", lambda t: t * 0 + 255, "Invalid mt19937 state"),
    "the step": (None, {"step": "7"}, "Adam's state is not that of step 7"),
    "a huge step": (None, {"step": "1" + 400 * "0"}, "Adam's state is not that of step 1000"),
    "an endless step": (None, {"step": 5000 * "1"}, "integer string conversion"),
    "no step": (None, {"step": None}, "got no 'step' in its metadata"),
    "a word for a step": (None, {"step": "two"}, "'two'"),
    "a short log": (None, {"metrics.jsonl": "9 -"}, "metrics.jsonl is not the log of these"),
    "a huge log": (None, {"samples.jsonl": f"{10**400}"}, "samples.jsonl is not the log"),
    "a log below 0": (None, {"samples.jsonl": "-1 -"}, "samples.jsonl is not the log"),
    "other inputs": (None, {"inputs": "-"}, "the run began with other inputs"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_checkpoint_that_was_edited(case: str, copy: Path) -> None:
    """A whole safetensors file, but not this run's: names, shapes, dtypes, values, metadata."""
    name, change, message = DAMAGES[case]
    path = copy / RATE / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = (
            {k: file.get_tensor(k).clone() for k in set(file.keys())},
            file.metadata(),
        )
    if name is None:
        metadata |= change
    else:
        tensors[name] = change(tensors.get(name))
    tensors = {k: t.contiguous() for k, t in tensors.items() if t is not None}
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})
    assert_refused(["--resume", str(copy)], message, copy)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Invert one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_finished_run_without_its_checkpoint_does_not_start_over(copy: Path) -> None:
    """Somebody has removed the largest file to save space; the weights and the logs stay."""
    (copy / RATE / "checkpoint.safetensors").unlink()
    assert_refused(["--resume", str(copy)], "got no checkpoint.safetensors, without which", copy)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.safetensors", cut),
        ("metrics.jsonl", flip),
        ("metrics.jsonl", Path.unlink),
        ("samples.jsonl", cut),
    ],
)
def test_a_damaged_file(name: str, damage, copy: Path) -> None:
    """It is named; a bit of a log is enough."""
    damage(copy / RATE / name)
    assert_refused(["--resume", str(copy)], "Nothing has been changed", copy)


def test_a_run_whose_files_have_moved(small_command, tmp_path: Path, monkeypatch) -> None:
    """It resumes from another working folder; given anew, its files must have the same content."""
    weights, ids, text = (tmp_path / name for name in ("weights", "ids", "text"))
    shutil.copytree(small_command[1], weights)
    shutil.copy(small_command[3], ids)
    text.write_text("The Mole had been working very hard all the morning.")
    monkeypatch.chdir(tmp_path)
    names = ["--weights", "weights", "--tokens", "ids", "--inputs", "text"]
    command = [*small_command, *names, "--out", "run"]
    for steps in (["--steps", "1"], ["--steps", "2", "--out", "whole"]):
        code, output = quick_run.run([*command, "--eval-every", "1", *steps], tmp_path / "log")
        assert code == 0, output
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    text.rename(tmp_path / "moved")
    resume = ["--resume", "../run", "--steps", "2"]
    assert_refused(resume, f"--inputs {text}: ", tmp_path / "run")
    text.write_text("The Mole had been working very hard all the evening.")
    assert_refused(resume, "the run began with other inputs", tmp_path / "run")
    code, output = quick_run.run([*resume, "--inputs", "../moved"], tmp_path / "log")
    assert code == 0, output
    assert_same_run(tmp_path / "run" / RATE, tmp_path / "whole" / RATE)
    options = json.loads((tmp_path / "run" / RATE / "config.json").read_text())["xfactor"][
        "options"
    ]
    assert options["inputs"] == str(tmp_path / "other" / ".." / "moved")


def test_a_second_command_in_the_same_folder(small_command, tmp_path: Path) -> None:
    """While the first is at work, which then continues."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*small_command, "--steps", "1000", "--out", str(out)], log)
    try:
        quick_run.wait_until(lambda: has_step(out / RATE), process.is_alive)
        with pytest.raises(SystemExit, match="is locked by another process"):
            quick_run.command(["--resume", str(out)])
        assert process.is_alive()
    finally:
        process.terminate()
        code, output = quick_run.finish(process, log)
    assert code == 143, output


def test_the_options_of_the_run_itself_are_not_refused(small_start, tmp_path: Path) -> None:
    """Repeated in another order: rates, and strings, which are appended to those on disk."""
    size = ["--steps", "1", "--batch", "2", "--length", "8", "--weights", str(small_start)]
    options = ["--contains", "qu", "--contains", "é", *size]
    out, log = str(tmp_path / "run"), tmp_path / "log"
    for arguments in (
        ["--lr", "1e-2", "1e-5", "--out", out],
        ["--lr", "1e-5", "1e-2", "--resume", out],
    ):
        code, output = quick_run.run([*options, *arguments], log)
        assert code == 0, output
    assert output.count("resumes after step 1") == 2
