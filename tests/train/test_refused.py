"""What is refused of a run on disk, in one line, and not a byte of the folder changes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train import quick_run
from tests.train.quick_run import contents, cut, flip, has_step

REFUSED = {
    "again": (["--out", "OUT"], "--resume"),
    "another rate": (["--resume", "OUT", "--lr", "1e-3"], "--lr"),
    "another goal": (["--resume", "OUT", "--regex", "X"], "--regex"),
    "another batch": (["--resume", "OUT", "--batch", "4"], "--batch"),
    "no run": (["--resume", "/nowhere"], "/nowhere"),
}


def assert_refused(arguments: list[str], message: str, folder: Path) -> None:
    """The command in this process: one line that holds the message, and the folder as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as raised:
        quick_run.command(arguments)
    assert message in str(raised.value)
    assert str(raised.value).startswith("error: ")
    assert "\n" not in str(raised.value)
    assert contents(folder) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_folder(case: str, whole_run: Path) -> None:
    """Options that the run there does not have."""
    given, message = REFUSED[case]
    out = str(whole_run.parent)
    assert_refused([out if a == "OUT" else a for a in given], message, whole_run.parent)


EDITS = {
    "a member": ("   55,", "   56,", "target_token_ids"),
    "an option": ('"batch": 2', '"batch": 4', "at step 8"),
    "no number": ('"steps": 8', '"steps": "many"', "config.json"),
    "no JSON": ('"batch": 2', '"batch" 2', "config.json"),
    "the model": ('"n_layer": 1', '"n_layer": 2', "n_layer"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_configuration_that_was_edited(case: str, whole_run: Path, tmp_path: Path) -> None:
    """It no longer says what the run was begun with, as when the file of --tokens has changed."""
    was, edited, message = EDITS[case]
    shutil.copytree(whole_run.parent, tmp_path / "run")
    config = tmp_path / "run" / "lr-0.01" / "config.json"
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, edited))
    assert_refused(["--resume", str(tmp_path / "run")], message, tmp_path)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("model.*", flip),
        ("model.*", Path.unlink),
        ("optimizer-*", cut),
        ("state-*", cut),
        ("metrics.*", flip),
        ("samples.*", cut),
    ],
)
def test_a_damaged_file(
    pattern: str, damage: Callable[[Path], None], whole_run: Path, tmp_path: Path
) -> None:
    """In a process of its own; the matrix of all files and damages is in test_saves.py."""
    shutil.copytree(whole_run.parent, tmp_path / "run")
    (path,) = (tmp_path / "run" / "lr-0.01").glob(pattern)
    damage(path)
    before = contents(tmp_path / "run")
    code, output = quick_run.run(["--resume", str(tmp_path / "run")], tmp_path / "log")
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(path) in last
    assert "Nothing has been changed" in last
    assert contents(tmp_path / "run") == before


def test_another_text_of_the_inputs(small_command, tmp_path: Path) -> None:
    """The file that --inputs names has changed since: its windows would be others."""
    text, out = tmp_path / "text", tmp_path / "run"
    text.write_text("The Mole had been working very hard all the morning.")
    arguments = [*small_command, "--inputs", str(text), "--steps", "1", "--out", str(out)]
    code, output = quick_run.run(arguments, tmp_path / "log")
    assert code == 0, output
    text.write_text("The Mole had been working very hard all the evening.")
    assert_refused(["--resume", str(out), "--steps", "2"], "inputs_sha256", out)


def test_a_second_command_in_the_same_folder(small_command, tmp_path: Path) -> None:
    """While the first is at work, which then goes on."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = quick_run.start([*small_command, "--steps", "1000", "--out", str(out)], log)
    try:
        quick_run.wait_until(lambda: has_step(out / "lr-0.01"), process.is_alive)
        with pytest.raises(SystemExit, match="another command is at work there"):
            quick_run.command(["--resume", str(out)])
        assert process.is_alive()
    finally:
        process.terminate()
        code, output = quick_run.finish(process, log)
    assert code == 143, output


def test_the_options_of_the_run_itself_are_not_refused(small_start, tmp_path: Path) -> None:
    """Repeated in another order: rates, and strings, which are appended to those on disk."""
    size = ["--steps", "1", "--batch", "2", "--length", "8", "--weights", str(small_start)]
    again = ["--lr", "1e-5", "1e-2", "--contains", "qu", "--contains", "é", *size]
    out = str(tmp_path / "run")
    code, output = quick_run.run([*again, "--out", out], tmp_path / "log")
    assert code == 0, output
    code, output = quick_run.run([*again, "--resume", out], tmp_path / "log")
    assert code == 0, output
    assert output.count("goes on after step 1") == 2
