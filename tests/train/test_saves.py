"""Every moment of a run's files: killed before each change, calls that fail, links, others' files.

A run on a small vocabulary, in this process or forks of one; commands are in test_run.py.
"""

import copy
import errno
import os
import signal
import stat
import sys
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import DEFAULT, patch

import pytest
import torch
from safetensors import SafetensorError

from kernels import TwoLevelTarget
from model import GPT2, GPT2Config
from tests.train import quick_run
from tests.train.quick_run import assert_same_run
from train import folder
from train.evaluate import Evaluation
from train.run import Run
from train.xfactor import Options, train
from weights import Layout

EVALUATION = Evaluation(0.0, 0.0, 1.0, float("inf"), 0.0, 1.0)
OPERATIONS = {f"os.{name}" for name in ("mkdir", "rmdir", "remove", "rename", "truncate", "chmod")}


def run(out: Path, steps: int = 2) -> None:
    """Run or continue; each step is logged, evaluated and saved."""
    torch.manual_seed(0)
    start = GPT2(GPT2Config(vocab_size=53, n_positions=16, n_embd=64, n_layer=1, n_head=1))
    model, target = copy.deepcopy(start), TwoLevelTarget(torch.arange(53) % 7 == 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    options = Options(steps=steps, batch=2, length=8, out=out)
    with (
        patch.multiple("train.run", **quick_run.SHORT),
        patch("train.run.evaluate", lambda *_: (EVALUATION, [("The", [1, 2, 3])])),
        folder.open_folder(out),
    ):
        a_run = Run(out, steps, 1, 0, model, optimizer, start, target.mask)
        restored = a_run.load()
        a_run.text = torch.arange(53)
        folder.write_config(out, Layout(1, 64, 53, 16), {})
        a_run.begin(restored)
        train(options, a_run, target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    run(out := tmp_path_factory.mktemp("whole") / "run")
    return out


def kill_before_every_change(arguments: list[str]) -> None:
    """Run in forks that die before their first change of a file, their second, and so on."""
    out = Path(arguments[0])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    run(out / "whole")
    for n in range(1, 1000):
        if (child := os.fork()) == 0:
            count = 0

            def die(event: str, arguments: tuple, n=n) -> None:
                nonlocal count
                opened = event == "open" and arguments[2] & os.O_ACCMODE  # to write
                count += (changing := bool(opened) or event in OPERATIONS)
                if changing and count == n:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            run(out / str(n))
            os._exit(0)
        killed = os.waitpid(child, 0)[1]
        assert killed in (0, signal.SIGKILL)
        if not killed:
            break
        run(out / str(n))
        assert_same_run(out / str(n), out / "whole")
    print(n, "changes")


def test_a_kill_before_any_change_of_a_file_continues_to_the_whole_run(tmp_path: Path) -> None:
    """While a folder is made, at each save and at the end."""
    code, output = quick_run.run([str(tmp_path)], tmp_path / "log", kill_before_every_change)
    assert code == 0, output
    assert int(output.split()[-2]) > 30


def test_both_logs_are_on_the_disk_before_each_state(tmp_path: Path) -> None:
    """Else a power failure could keep a state and lose what was logged before it. An infinite
    perplexity is null, as JSON has no infinity."""
    with patch("train.run.fsync") as fsync, patch("train.run.torch.save", wraps=torch.save) as save:
        save.side_effect = lambda *_: fsync("a state")
        run(tmp_path / "run")
    flushed = [call.args[0] for call in fsync.call_args_list]
    assert flushed == 2 * [*(tmp_path / "run" / log for log in folder.LOGS), "a state"]
    assert '"passage_perplexity": null' in (tmp_path / "run" / "log.jsonl").read_text()


ALL = ["os.open", "os.mkdir", "os.replace", "os.fsync", "os.unlink", "os.rmdir", "os.chmod"]
FULL = SafetensorError("No space left on device")  # of safetensors, for the model's file


@pytest.mark.parametrize(
    ("functions", "after", "error"),
    [
        (["train.run.save_file"], 0, FULL),
        (ALL, 0, OSError(errno.ENOSPC, "No space left on device")),
        (ALL, 3, OSError(errno.EIO, "Input/output error")),
    ],
    ids=str,
)
def test_an_error_of_the_disk_is_one_line_and_keeps_what_was_saved(
    functions: list[str], after: int, error: Exception, whole: Path, tmp_path: Path
) -> None:
    """Functions fail after some calls of each, for a new run and for one that continues; once the
    disk is well again, both are the whole."""
    run(tmp_path / "old", steps=1)
    for name in ("new", "old"):
        with ExitStack() as stack:
            for function in functions:
                effects = chain(repeat(DEFAULT, after), repeat(error))
                wrapped = patch(function, wraps=resolve_name(function), side_effect=effects)
                stack.enter_context(wrapped)
            with pytest.raises(ValueError, match=r"^cannot write to .*") as raised:
                run(tmp_path / name)
        assert error.args[-1] in str(raised.value)
    assert torch.load(tmp_path / "old" / "state.pt", weights_only=True)["step"] >= 1
    for name in ("new", "old"):
        run(tmp_path / name)
        assert_same_run(tmp_path / name, whole)


def test_a_file_system_without_locks_and_fsync_of_folders_is_a_warning(whole, tmp_path) -> None:
    """As some network file systems are; the run is the same. A new one holds lost+found."""
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    with (
        patch("os.fsync", of_files_only),
        patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "no locks")),
        pytest.warns(UserWarning, match="cannot lock"),
        pytest.warns(UserWarning, match="folders cannot be fsynced"),
    ):
        run(tmp_path / "run")
    (tmp_path / "run" / "lost+found").rmdir()
    assert_same_run(tmp_path / "run", whole)


LEFT = (".state.pt.0123456789abcdef.tmp", ".tmpY9xCTi")  # by a command that was killed
OTHERS = (".syncthing.x.tmp", "optimizer.pt", ".tmpcache", ".a.0123456789abcdeg.tmp")


def test_files_of_others_survive_and_those_of_a_kill_go(whole: Path, tmp_path: Path) -> None:
    """Also names that look like temporary ones, and what a link in place of a file leads to."""
    run(out := tmp_path / "run", steps=1)
    for path in list(out.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path != out}
    for name in LEFT + OTHERS:
        (out / name).write_text("x")
    run(out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != out} == before
    for name in OTHERS:
        assert (out / name).read_text() == "x"
        (out / name).unlink()
    assert_same_run(out, whole)  # whose names are compared too


@pytest.mark.parametrize("name", ["run/config.json", "log.jsonl", ".hidden"])
def test_a_folder_that_holds_something_else_is_refused(name: str, tmp_path: Path) -> None:
    """Untouched, not even a time changes; also what looks like a file that a kill has left."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    (tmp_path / LEFT[1]).write_text("x")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    top = name.partition("/")[0]
    with pytest.raises(ValueError, match=f"holds '{top}' and no run; give a new or an empty"):
        run(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    assert after == before


def test_a_folder_is_of_one_command_and_goes_if_that_leaves_nothing_in_it(tmp_path: Path) -> None:
    """A second one is refused; after an error the folder goes, with its new parents."""
    with pytest.raises(ValueError, match="locked by another"), folder.open_folder(tmp_path / "a/b"):
        run(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
