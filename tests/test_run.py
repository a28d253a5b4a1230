"""A run on disk: killed, stopped, without space, damaged, it goes on or says why it cannot.

The commands run in processes of their own (`quick_run`), on the CPU: the subject is the folder.
"""

import math
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from model import GPT2, GPT2Config
from tests import quick_run
from tests.quick_run import contents, logged
from weights import load_weights, save_weights

KILLS = 20


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command of some steps, each saved, on a small model over the tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1))
    save_weights(model.state_dict(), folder)
    (folder / "ids").write_text("55\n87\n")
    size = ["--steps", "8", "--batch", "2", "--length", "8", "--lr", "1e-2", "--save-every", "1"]
    return ["--weights", str(folder), "--tokens", str(folder / "ids"), "--eval-every", "4", *size]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = quick_run.run([*command, "--out", str(folder / "run")], folder / "log")
    assert code == 0, output
    return folder / "run" / "lr-0.01"


def assert_same_run(folder: Path, whole: Path) -> None:
    """Losses, samples and weights, bit for bit, and no file that the other has not."""
    assert logged(folder) == logged(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    expected = load_weights(whole)
    for name, p in load_weights(folder).items():
        assert torch.equal(p, expected[name]), name
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_run_killed_twenty_times_is_the_run_that_was_never_stopped(
    command: list[str], tmp_path: Path
) -> None:
    """SIGKILL at random times, while starting or within a step or its save; each start goes on from
    the last step that was logged or the one before it, every step being saved."""
    out, log, at_random = tmp_path / "run", tmp_path / "log", random.Random(0)
    folder, metrics = out / "lr-0.01", out / "lr-0.01" / "metrics.jsonl"
    plain = [*command, "--eval-every", "0"]
    quick_run.run([], log, print)  # the fork server is up
    before, began, span = 0, time.monotonic(), 0.0
    for kill in range(KILLS + 1):
        given = ["--resume", str(out)] if out.exists() else [*plain, "--out", str(out)]
        process = quick_run.start([*given, "--steps", "1000"], log)
        while kill == 0 and not (metrics.exists() and metrics.stat().st_size > 1000):
            assert time.monotonic() - began < quick_run.LIMIT, log.read_text()
            time.sleep(0.01)  # the first one is let run, to see how long a start takes
        span = span or min(2.5, time.monotonic() - began)
        if kill:
            time.sleep(at_random.uniform(0.1, 1.1) * span)
        process.kill()
        code, output = quick_run.finish(process, log)
        assert code == -signal.SIGKILL, output
        if resumed := re.search(r"goes on after step (\d+)", output):
            assert int(resumed[1]) >= before - 1
        before = metrics.read_bytes().count(b'"loss"')
    steps = ["--steps", str(before + 2)]
    code, output = quick_run.run(["--resume", str(out), *steps], log)
    assert code == 0, output
    whole = [*plain, *steps, "--save-every", "0", "--out", str(tmp_path / "whole")]
    code, output = quick_run.run(whole, log)
    assert code == 0, output
    assert_same_run(folder, tmp_path / "whole" / "lr-0.01")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_saved_step(number, code, command, whole, tmp_path) -> None:
    """The command it names then gives the run that was never stopped."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*command, "--save-every", "0", "--out", str(out)], log)
    metrics = out / "lr-0.01" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and b'"loss"' in metrics.read_bytes()):
        time.sleep(0.01)
    os.kill(process.pid, number)
    stopped, output = quick_run.finish(process, log)
    assert stopped == code, output
    assert f"stopped by {number.name}" in output
    assert f"--resume {out}" in output
    assert (out / "lr-0.01" / "model.safetensors").exists()
    done, output = quick_run.run(["--resume", str(out)], log)
    assert done == 0, output
    assert_same_run(out / "lr-0.01", whole)


def command_on_a_full_disk(arguments: list[str]) -> None:
    """No file may grow beyond 20 MB: Adam's 26 MB do not fit, the weights' 13 MB do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    quick_run.command(arguments)


def test_a_full_disk_is_one_error_and_leaves_the_save_before(command, whole, tmp_path) -> None:
    """A limit on the size of files stands for it; with space again, the run goes on."""
    out, log = tmp_path / "run", tmp_path / "log"
    code, output = quick_run.run([*command, "--steps", "4", "--out", str(out)], log)
    assert code == 0, output
    before = contents(out / "lr-0.01")
    code, output = quick_run.run(
        ["--resume", str(out), "--steps", "8"], log, command_on_a_full_disk
    )
    assert code == 1
    assert "error: cannot save step 5" in output.splitlines()[-1]
    assert "step 4 is the last one saved" in output.splitlines()[-1]
    after = contents(out / "lr-0.01")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if "safetensors" in name)
    code, output = quick_run.run(["--resume", str(out), "--steps", "8"], log)
    assert code == 0, output
    assert_same_run(out / "lr-0.01", whole)


def test_a_folder_that_is_removed_is_one_error_and_stays_removed(command, tmp_path) -> None:
    """In the middle of a run; nothing is written beside or in place of it."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*command, "--steps", "1000", "--out", str(out)], log)
    while process.is_alive() and not (out / "lr-0.01" / "model.safetensors").exists():
        time.sleep(0.01)
    os.rename(out, tmp_path / "removed")
    code, output = quick_run.finish(process, log)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: cannot ")
    assert str(out / "lr-0.01") in output.splitlines()[-1]
    assert not out.exists()


def test_a_rate_that_diverges_is_one_error_with_the_step(command, tmp_path) -> None:
    """The weights overflow; what is logged and saved is finite."""
    out, log = tmp_path / "run", tmp_path / "log"
    code, output = quick_run.run([*command, "--lr", "1e30", "--out", str(out)], log)
    assert code == 1
    assert re.search(r"error: the loss became (nan|inf) at step \d; step \d is", output), output
    assert all(math.isfinite(loss) for _, loss, _ in logged(out / "lr-1e+30"))
    load_weights(out / "lr-1e+30")  # refuses what is not finite


REFUSED = {
    "again": (["--out", "OUT"], "--resume"),
    "another rate": (["--resume", "OUT", "--lr", "1e-3"], "--lr"),
    "another goal": (["--resume", "OUT", "--regex", "X"], "--regex"),
    "another batch": (["--resume", "OUT", "--batch", "4"], "--batch"),
    "no run": (["--resume", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_folder_is_refused(case, whole, monkeypatch, capsys) -> None:
    """One line, exit 1, and not a byte of the folder changes."""
    given, message = REFUSED[case]
    before = contents(whole.parent)
    with pytest.raises(SystemExit) as raised:
        quick_run.command([str(whole.parent) if a == "OUT" else a for a in given])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(whole.parent) == before


EDITS = {
    "a member": ("   55,", "   56,", "member_ids"),
    "an option": ('"batch": 2', '"batch": 4', "at step 8"),
    "no number": ('"steps": 8', '"steps": "many"', "config.json"),
    "no JSON": ('"batch": 2', '"batch" 2', "config.json"),
    "the model": ('"n_layer": 1', '"n_layer": 2', "n_layer"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_configuration_that_was_edited_is_refused(case, whole, tmp_path) -> None:
    """It no longer says what the run was begun with, as when the file of --tokens has changed."""
    was, edited, message = EDITS[case]
    shutil.copytree(whole.parent, tmp_path / "run")
    config = tmp_path / "run" / "lr-0.01" / "config.json"
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, edited))
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=message):
        quick_run.command(["--resume", str(tmp_path / "run")])
    assert contents(tmp_path) == before


def test_transformers_loads_a_run(whole: Path) -> None:
    """The folder as it is; the logits are this model's."""
    from transformers import GPT2LMHeadModel  # here: each child process imports this file too

    tokens = torch.arange(1, 9)[None]
    expected = GPT2.from_state_dict(load_weights(whole))(tokens)
    theirs = GPT2LMHeadModel.from_pretrained(whole).eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
