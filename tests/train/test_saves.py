"""Every moment of a run's files: killed before each operation, each operation failing, links.

A run on a small model, in this process or forks of one; the commands are in test_run.py.
"""

import errno
import fcntl
import json
import os
import re
import signal
import stat
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train.evaluate
from kernels import TwoLevelTarget
from model import GPT2, GPT2Config
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, contents, has_step
from train import checkpoint
from train.inputs import sample_text
from train.xfactor import Options, fine_tune

RATE = "lr-0.01"
EVALUATION = train.evaluate.Evaluation(0.0, 0.0, 1.0, 1.0, [("The", [1, 2, 3])])
OPERATIONS = {f"os.{name}" for name in ("mkdir", "rmdir", "remove", "rename", "truncate", "chmod")}


def run(out: Path, steps: int = 2, resuming: bool = False) -> None:
    """Run one rate of the experiment on a small model; each step is saved."""
    torch.manual_seed(0)
    start = GPT2(GPT2Config(vocab_size=53, n_positions=16, n_embd=64, n_layer=1, n_head=1))
    target = TwoLevelTarget(torch.arange(53) % 7 == 0)
    options = Options(steps=steps, batch=2, length=8, save_every=1, eval_every=1, out=out)
    text = torch.arange(53)
    origin = checkpoint.origin(options, start, target.index, text)
    with (
        patch("train.xfactor.evaluate", lambda *_: EVALUATION),
        checkpoint.open_folder(out, [RATE], resuming),
    ):
        checkpoint.read(out / RATE, start, origin)
        checkpoint.create(out / RATE, {}, {"options": asdict(options)})
        of_run = {"lr": 0.01, "target": target, "bias": None, "start": start, "before": EVALUATION}
        assert not fine_tune(options, folder=out / RATE, text=text, origin=origin, **of_run)


def run_again(out: Path) -> None:
    """Do what a user does after a kill: resume what is there, or give the command again."""
    run(out, resuming=any(out.glob("*/config.json")))


def kill_before_every_change(arguments: list[str]) -> None:
    """Run in forks that die before their first change of a file, their second, and so on.

    Before the next one is after this one. Prints how often a checkpoint of each step was there.
    """
    folder, until = Path(arguments[0]), int(arguments[1])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    run(folder / "whole")
    found: list[int] = []
    for n in range(1, 1000):
        out = folder / str(n)
        if until == 2:
            run(out, steps=1)
        if (child := os.fork()) == 0:
            count = 0

            def die(event: str, arguments: tuple, n=n) -> None:
                nonlocal count
                opened = event == "open" and arguments[2] & os.O_ACCMODE  # to write
                changing = bool(opened) or event in OPERATIONS
                count += changing
                if changing and count == n:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            run(out, steps=until, resuming=until == 2)
            os._exit(0)
        killed = os.waitpid(child, 0)[1]
        assert killed in (0, signal.SIGKILL)
        kept = checkpoint.last_save(out / RATE)
        found.append(int(kept.split()[1]) if kept[:4] == "step" else 0)
        run_again(out)
        assert_same_run(out / RATE, folder / "whole" / RATE)
        if not killed:
            break
    print(json.dumps(found))


@pytest.mark.parametrize("until", [1, 2])
def test_a_kill_before_any_change_of_a_file_is_resumed_to_the_whole_run(
    until: int, tmp_path: Path
) -> None:
    """While a folder is made, at its first save, at a resumption, at a later save, at the end."""
    arguments = [str(tmp_path), str(until)]
    code, output = quick_run.run(arguments, tmp_path / "log", kill_before_every_change)
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert len(found) > 25
    assert found == sorted(found)
    assert set(found) == {until - 1, until}


ALL = ["open", "mkdir", "replace", "fsync", "ftruncate", "unlink", "rmdir", "chmod", "utime"]
ERRORS = [  # the function of os that fails, after how many calls, and how
    (["open"], 0, errno.EMFILE),
    (["fsync"], 1, errno.EIO),
    (["replace"], 1, errno.EDQUOT),
    (["mkdir"], 1, errno.EROFS),
    (ALL, 0, errno.ENOSPC),
    (ALL, 2, errno.EIO),
]


def failing(functions: list[str], after: int, number: int) -> ExitStack:
    """Let functions of os raise an OSError, each after its first calls."""

    def failing_function(name: str):
        function, calls = getattr(os, name), []

        def fail(*arguments, **options):
            calls.append(name)
            if len(calls) > after:
                raise OSError(number, os.strerror(number))
            return function(*arguments, **options)

        return fail

    stack = ExitStack()
    for name in functions:
        stack.enter_context(patch(f"os.{name}", failing_function(name)))
    return stack


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: f"{errno.errorcode[e[2]]}-{len(e[0])}")
def test_an_error_of_the_disk_is_one_line_and_keeps_what_was_saved(error, tmp_path: Path) -> None:
    """A first command leaves nothing, unless cleaning up fails too, and works once the disk is well
    again; a resumption leaves the save, and resumes then."""
    functions, _, number = error
    run(tmp_path / "whole")
    run(tmp_path / "run", steps=1)
    saved = {k: v for k, v in contents(tmp_path / "run").items() if "safetensors" in k}
    for out, resuming in ((tmp_path / "new", False), (tmp_path / "run", True)):
        with failing(*error), pytest.raises(ValueError, match="cannot ") as raised:
            run(out, resuming=resuming)
        assert os.strerror(number) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists() or has_step(tmp_path / "new" / RATE) or functions == ALL
    assert saved.items() <= contents(tmp_path / "run").items()
    for out in (tmp_path / "new", tmp_path / "run"):
        run_again(out)
        assert_same_run(out / RATE, tmp_path / "whole" / RATE)


def test_a_file_system_without_locks_and_fsync_of_folders_is_a_warning(tmp_path: Path) -> None:
    """As some network file systems are; the run is the same."""
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    run(tmp_path / "whole")
    no_locks = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with (
        patch("os.fsync", of_files_only),
        patch("fcntl.flock", side_effect=no_locks),
        pytest.warns(UserWarning, match="is not locked, as its file system has no locks"),
        pytest.warns(UserWarning, match="folders cannot be fsynced"),
    ):
        run(tmp_path / "run")
    assert_same_run(tmp_path / "run" / RATE, tmp_path / "whole" / RATE)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "checkpoint.safetensors", "model.safetensors"]
)
def test_a_link_is_not_followed_on_writing(name: str, tmp_path: Path) -> None:
    """In place of a file of the run: what it leads to stays as it is."""
    run(tmp_path / "run", steps=1)
    path, elsewhere = tmp_path / "run" / RATE / name, tmp_path / "elsewhere"
    before = path.read_bytes()
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with (
        nullcontext() if "jsonl" not in name else pytest.raises(ValueError, match="symbolic links")
    ):
        run(tmp_path / "run", resuming=True)
    assert elsewhere.read_bytes() == before


def test_a_link_in_place_of_the_folder_for_temporary_files_is_an_error(tmp_path: Path) -> None:
    """Nothing is removed where it leads to."""
    run(tmp_path / "run", steps=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "run" / RATE / checkpoint.STAGING).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="File exists"):
        run(tmp_path / "run", resuming=True)
    assert (tmp_path / "elsewhere" / "file").exists()


def test_temporary_names_are_unpredictable_and_exclusive(tmp_path: Path) -> None:
    """In a folder that is nobody else's; the mode of what takes its place is the usual one."""
    names, replace = [], os.replace

    def collect(source: Path, target: Path) -> None:
        names.append(source.name)
        assert stat.S_IMODE(source.parent.stat().st_mode) == 0o700
        replace(source, target)

    with patch("os.replace", collect):
        run(tmp_path / "run")
    assert len(set(names)) == len(names) > 3
    assert all(re.search(r"[0-9a-f]{16}", name) for name in names)
    (tmp_path / "usual").touch()
    for path in (tmp_path / "run" / RATE).iterdir():
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_files_of_others_in_a_run_survive(tmp_path: Path) -> None:
    """Names that look like temporary files or an optimizer's, through saves and a resumption."""
    run(tmp_path / "run", steps=1)
    for folder in (tmp_path / "run", tmp_path / "run" / RATE):
        (folder / ".syncthing.x.tmp").write_text("x")
        (folder / "optimizer-best.safetensors").write_text("x")
        (folder / ".tmpcache").mkdir()
        (folder / ".tmpcache" / "file").write_text("x")
    run(tmp_path / "run", resuming=True)
    for folder in (tmp_path / "run", tmp_path / "run" / RATE):
        for name in (".syncthing.x.tmp", "optimizer-best.safetensors", ".tmpcache/file"):
            assert (folder / name).read_text() == "x"


@pytest.mark.parametrize("mode", [0o700, 0o755], ids=oct)
def test_an_empty_folder_is_used_as_it_is(mode: int, tmp_path: Path, monkeypatch) -> None:
    """It stays the same folder, with its mode; `.` is one, and its parent is left alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(mode)
    monkeypatch.chdir(tmp_path / "out")
    before = (tmp_path / "out").stat(), tmp_path.stat().st_mtime_ns
    run(Path())
    after = (tmp_path / "out").stat()
    assert (after.st_mode, after.st_ino) == (before[0].st_mode, before[0].st_ino)
    assert tmp_path.stat().st_mtime_ns == before[1]
    assert (tmp_path / "out" / RATE / "model.safetensors").exists()


def test_a_new_mount_point_under_a_parent_that_is_read_only_is_used(tmp_path: Path) -> None:
    """It holds only lost+found, as a new ext4 file system does; nothing is made beside it."""
    (tmp_path / "parent" / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o500)  # which does not hinder root: the time is for that
    before = (tmp_path / "parent").stat().st_mtime_ns
    run(tmp_path / "parent" / "out")
    assert (tmp_path / "parent").stat().st_mtime_ns == before
    (tmp_path / "parent").chmod(0o700)
    assert {path.name for path in (tmp_path / "parent" / "out").iterdir()} == {"lost+found", RATE}


def test_a_new_folder_is_on_disk_with_its_parents(tmp_path: Path) -> None:
    """Each parent of a folder that was made is flushed, and both logs before each of two saves."""
    flushed = []
    with patch("train.checkpoint.fsync", lambda path: flushed.append(path)):
        run(tmp_path / "a" / "b")
    assert flushed[:3] == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert flushed[3:] == 2 * [tmp_path / "a" / "b" / RATE / log for log in checkpoint.LOGS]


@pytest.mark.parametrize(
    "name",
    ["file", RATE, f"{RATE}/file", "lr-1/config", checkpoint.SAMPLED, f"{RATE}/metrics.jsonl"],
)
def test_a_folder_that_is_not_empty_and_holds_no_run_is_refused(name: str, tmp_path: Path) -> None:
    """Untouched, not even the times of the folder change: also files with the names of a run's."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    before = {path: path.stat() for path in (tmp_path, *tmp_path.rglob("*"))}
    top = name.partition("/")[0]
    with pytest.raises(ValueError, match=f"contains '{top}' and no run; choose a new or an empty"):
        run(tmp_path)
    after = {path: path.stat() for path in (tmp_path, *tmp_path.rglob("*"))}
    assert {p: s.st_mtime_ns for p, s in after.items()} == {
        p: s.st_mtime_ns for p, s in before.items()
    }


def test_a_run_that_another_command_has_just_ended_is_refused(tmp_path: Path) -> None:
    """It was made after this command began and before the folder could be locked; it stays."""
    config, lock = tmp_path / RATE / "config.json", fcntl.flock

    def lock_after_another(*arguments: int) -> None:
        config.parent.mkdir()
        config.write_text("{}")
        lock(*arguments)

    with patch("fcntl.flock", lock_after_another), pytest.raises(ValueError, match="holds a run"):
        run(tmp_path)
    assert config.read_text() == "{}"


def test_an_error_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    """Neither the folder nor its new parents; in a folder that was there, nothing. The corrected
    command then works."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        with patch("train.xfactor.get_batch", side_effect=KeyError), pytest.raises(KeyError):
            run(out)
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    run(tmp_path / "empty")


def test_a_clock_that_stands_still_divides_nothing_by_zero(tmp_path: Path) -> None:
    """Steps take 0 seconds then."""
    with patch("time.perf_counter", lambda: 1.0):
        run(tmp_path / "run")
    lines = (tmp_path / "run" / RATE / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines if "loss" in line] == [0.0, 0.0]


def test_text_of_the_start_is_sampled_once_per_start_and_seed(tmp_path: Path) -> None:
    """Then read; a file that a killed command of another seed or model left is not used. A full
    disk is one line."""
    size = GPT2Config(n_positions=16, n_embd=64, n_layer=1, n_head=1)
    models = [GPT2(size).requires_grad_(False) for _ in range(2)]
    cpu, path = torch.device("cpu"), tmp_path / checkpoint.SAMPLED
    with patch.multiple("train.inputs", TEXTS=2, BATCH=2, TOKENS=8):
        first = sample_text(tmp_path, models[0], 0, cpu, False)
        written = path.stat().st_ino
        assert torch.equal(sample_text(tmp_path, models[0], 0, cpu, True), first)
        assert path.stat().st_ino == written
        assert not torch.equal(sample_text(tmp_path, models[1], 0, cpu, False), first)
        assert not torch.equal(sample_text(tmp_path, models[0], 1, cpu, False), first)
        with (
            failing(["replace"], 0, errno.ENOSPC),
            pytest.raises(ValueError, match="cannot write"),
            checkpoint.open_folder(tmp_path, [], resuming=True),
        ):
            sample_text(tmp_path, models[0], 0, cpu, False)


@pytest.mark.parametrize("damage", ["nothing", "a bit", "the file"])
def test_text_that_runs_have_trained_on_is_not_sampled_anew(damage: str, tmp_path: Path) -> None:
    """On another device it might be another text: without the file as it was, they do not go on."""
    start = GPT2(GPT2Config(n_positions=16, n_embd=64, n_layer=1, n_head=1)).requires_grad_(False)
    cpu, path = torch.device("cpu"), tmp_path / checkpoint.SAMPLED
    with patch.multiple("train.inputs", TEXTS=2, BATCH=2, TOKENS=8):
        first = sample_text(tmp_path, start, 0, cpu, False)
        data = bytearray(path.read_bytes())
        data[-8] ^= 1  # of the last id
        if damage == "the file":
            path.unlink()
        else:
            path.write_bytes(data if damage == "a bit" else path.read_bytes())
        if damage == "nothing":
            assert torch.equal(sample_text(tmp_path, start, 0, cpu, True), first)
        else:
            with pytest.raises(ValueError, match="restore it, or start another run"):
                sample_text(tmp_path, start, 0, cpu, True)


def test_what_a_killed_command_left_in_the_folder_is_no_hindrance(tmp_path: Path) -> None:
    """A temporary file and the folder of a run, empty or with one; an early error removes them."""
    (tmp_path / checkpoint.STAGING).mkdir()
    (tmp_path / RATE / checkpoint.STAGING).mkdir(parents=True)
    with patch("train.xfactor.get_batch", side_effect=KeyError), pytest.raises(KeyError):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.STAGING]
    run(tmp_path)


def test_an_error_says_how_to_resume_only_if_something_is_left_to_resume(tmp_path: Path) -> None:
    """In a note, which the command adds to the line of a signal."""
    for after in (0, 1):
        batches = [torch.zeros(2, 8, dtype=torch.int64)] * after
        batch = patch("train.xfactor.get_batch", side_effect=[*batches, KeyError])
        with batch, pytest.raises(KeyError) as raised:
            run(tmp_path / "a run")
        notes = [f"resume with --resume '{tmp_path}/a run'"] if after else []
        assert getattr(raised.value, "__notes__", []) == notes
