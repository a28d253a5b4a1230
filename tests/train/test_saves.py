"""A save on disk: whatever kills it, whatever damages it; on a small model, on the CPU.

The commands as a user runs them are in test_run.py.
"""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import train.saves as train_saves
from train.folders import create, digest
from train.run import Run
from train.saves import LOGS, Training, read_save, sweep, write_save

from kernels import TwoLevelTarget
from model import GPT2, GPT2Config
from tests.train import quick_run
from tests.train.quick_run import contents, cut, flip, logged
from train.evaluate import Evaluation
from train.inputs import Inputs
from train.xfactor import LOSSES, training_steps
from weights.checkpoint import atomic_write

SMALL = GPT2Config(vocab_size=503, n_positions=16, n_embd=64, n_layer=1, n_head=1)
CONFIG = {"xfactor": {"lr": 1e-2, "options": {}}}
EVALUATION = Evaluation(0.0, 0.0, 1.0, 1.0, [("The", [1, 2, 3])])


def new_training() -> tuple[Training, Inputs]:
    """The same small model each time, before its first step, and its inputs."""
    torch.manual_seed(0)
    model = GPT2(SMALL)
    inputs = Inputs(SMALL.vocab_size, 2, 8, 0, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    return Training(model, optimizer, inputs.generator), inputs


def train(run: Run, training: Training, inputs: Inputs, until: int) -> list[float]:
    """Steps up to `until`; their losses."""
    members = torch.arange(SMALL.vocab_size) % 29 == 0
    model, optimizer = training.model, training.optimizer
    steps = training_steps(model, optimizer, TwoLevelTarget(members), inputs.draw, LOSSES["linear"])
    losses = []
    while run.step < until:
        loss, mass = next(steps)
        run.add(loss, mass)
        losses.append(loss.item())
    run.flush()
    return losses


def saved_run(folder: Path, step: int = 2) -> tuple[Run, Training, Inputs]:
    """A run that was saved at `step` and has logged two more."""
    create(folder.parent, {folder.name: CONFIG})
    run, (training, inputs) = Run(folder), new_training()
    train(run, training, inputs, step)
    run.evaluate(lambda: EVALUATION)
    run.save(training)
    train(run, training, inputs, step + 2)
    return run, training, inputs


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    """Losses and weights, bit for bit; the steps logged after the save are cut and run again."""
    create(tmp_path / "whole", {"a": CONFIG})
    whole, (training, inputs) = Run(tmp_path / "whole" / "a"), new_training()
    expected = train(whole, training, inputs, 7)
    saved_run(tmp_path / "stopped" / "a", step=3)

    resumed, (again, inputs) = Run(tmp_path / "stopped" / "a"), new_training()
    resumed.restore(again)
    resumed.begin(CONFIG)
    assert resumed.step == 3
    assert train(resumed, again, inputs, 7) == expected[3:]
    assert logged(resumed.folder) == logged(whole.folder)
    for name, p in training.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], p), name


def rename_all_but(path: Path):
    """os.replace, which fails onto one path."""
    replace = os.replace

    def rename(source, target) -> None:
        if target == path:
            raise OSError("no such luck")
        replace(source, target)

    return rename


def kill_at_every_line(arguments: list[str]) -> None:
    """In a process of its own: save in children that die at the first line, the second, ..."""
    folder, until = Path(arguments[0]), int(arguments[1])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    create(folder.parent, {folder.name: CONFIG})
    run, (training, inputs) = Run(folder), new_training()
    train(run, training, inputs, 2)
    if until == 4:
        write_save(folder, 2, training, 0, "")
        train(run, training, inputs, 4)
    traced = {write_save.__code__.co_filename, atomic_write.__wrapped__.__code__.co_filename}
    functions = {"write_save", "sweep", "atomic_write", "fsync"}
    outcomes, copy = [], folder.with_name("copy")
    for n in range(1, 1000):
        shutil.copytree(folder, copy)
        child = os.fork()
        if child == 0:
            lines = 0

            def trace(frame, event, _, n=n):
                nonlocal lines
                if frame.f_code.co_filename not in traced or frame.f_code.co_name not in functions:
                    return None
                lines += event == "line"
                if lines == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            write_save(copy, until, training, until - 2, "")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        restored, _ = new_training()
        step, sizes = read_save(copy, restored, "")
        outcomes.append(step)
        for log in LOGS:
            assert (copy / log).stat().st_size >= sizes[log]
        if step == until:
            for name, p in training.model.state_dict().items():
                assert torch.equal(restored.model.state_dict()[name], p)
        shutil.rmtree(copy)
        if not killed:
            break
    print(json.dumps(outcomes))


@pytest.mark.parametrize("until", [2, 4])
def test_a_kill_at_any_line_of_a_save_leaves_the_save_before_or_this_one(
    until: int, tmp_path: Path
) -> None:
    """The first save and the second. Both outcomes occur, once each in the order of the lines."""
    arguments = [str(tmp_path / "runs" / "a"), str(until)]
    code, output = quick_run.run(arguments, tmp_path / "log", kill_at_every_line)
    assert code == 0, output
    outcomes = json.loads(output.splitlines()[-1])
    assert len(outcomes) > 40
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {until - 2, until}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_while_the_rest_of_a_first_save_is_removed(at: int, tmp_path, monkeypatch) -> None:
    """The save ended before its last rename; at each removal, the folder goes on from its start."""
    create(tmp_path / "runs", {"a": CONFIG})
    run, (training, inputs) = Run(tmp_path / "runs" / "a"), new_training()
    train(run, training, inputs, 2)
    with monkeypatch.context() as patch:
        patch.setattr(train_saves.os, "replace", rename_all_but(run.folder / train_saves.MODEL))
        with pytest.raises(ValueError, match="cannot save step 2"):
            run.save(training)
    left = iter(range(100))

    def dying(remove):
        def removed(*args, **options):
            if next(left) == at:
                raise KeyboardInterrupt
            remove(*args, **options)

        return removed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(train_saves.shutil, "rmtree", dying(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            sweep(run.folder, 0)
    assert read_save(run.folder, new_training()[0], digest(CONFIG))[0] == 0


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("pattern", ["model.*", "optimizer-*", "state-*", *LOGS])
def test_a_damaged_file_is_named_and_nothing_is_changed(pattern, damage, tmp_path: Path) -> None:
    """One bit of any of them is enough; every byte that was there stays."""
    run, *_ = saved_run(tmp_path / "runs" / "a", step=8)
    (path,) = run.folder.glob(pattern)
    damage(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"Nothing has been changed|No such file") as raised:
        Run(run.folder).restore(new_training()[0])
    assert str(run.folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_save(
    bad: float, tmp_path: Path
) -> None:
    """Also when nobody looked for several steps; the steps before it are logged."""
    run, training, _ = saved_run(tmp_path / "runs" / "a", step=2)
    for loss in (0.5, bad, 0.25):
        run.add(torch.tensor(loss), torch.tensor(0.5))
    run.save(training)
    assert "at step 6; step 2 is the last one saved" in str(run.diverged)
    assert [step for step, *_ in logged(run.folder)] == [1, 2, 3, 4, 5]
    assert read_save(run.folder, new_training()[0], digest(CONFIG))[0] == 2
