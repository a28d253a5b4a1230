"""The experiment on a small model: the curves that a run must have, and the options it refuses."""

import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from kernels.reference import kl_div
from model import GPT2, GPT2Config
from model.tokenizer import load_tokenizer
from tests.train import quick_run
from train import xfactor
from train.report import figures
from train.target_tokens import LETTER_X, make_target, matching
from train.xfactor import Options, get_batch
from weights import load_weights, save_weights

CPU = torch.device("cpu")
Curve = Callable[..., list[float]]


@pytest.fixture
def curve(small_start: Path, tmp_path: Path) -> Curve:
    """A run of the command in this process; returns its losses."""

    def run(*options: str, lr: str = "1e-3") -> list[float]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        size = ["--batch", "2", "--length", "16", "--steps", "4", "--lr", lr]
        words = ["--model", str(small_start), *size, "--out", str(out), *options]
        quick_run.command(words, SAVE_EVERY=60)
        return quick_run.losses(out)

    return run


def test_a_rate_of_0_changes_nothing_and_step_n_has_the_batch_n(curve, small_start) -> None:
    """Each loss is the start's in float64, on a batch that seed and step alone decide."""
    start = GPT2.from_state_dict(load_weights(small_start)).double()
    target = make_target(matching(load_tokenizer(), LETTER_X))
    for step, loss in zip(range(4), curve("--seed", "5", lr="0"), strict=True):
        tokens = get_batch(Options(batch=2, length=16, seed=5), None, step, CPU)
        with torch.no_grad():
            assert loss == pytest.approx(kl_div(start(tokens), target).item(), rel=1e-5)


def test_inputs_cover_the_vocabulary_and_windows_lie_in_the_text() -> None:
    """Both ends occur; every window is a piece of the text, the first and the last included;
    another seed or step gives other ids."""
    options = Options(batch=8192, length=64)
    ids = get_batch(options, None, 0, CPU)
    assert (ids.min(), ids.max()) == (0, 50256)
    for seed, step in ((0, 1), (1, 0)):
        other = get_batch(replace(options, seed=seed), None, step, CPU)
        assert (ids == other).float().mean() < 0.01
    windows = get_batch(Options(batch=64, length=8), torch.arange(100, 110), 0, CPU)
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {100, 101, 102}


@pytest.mark.parametrize(
    ("target", "path", "tolerance"),
    [("--mass=0.9", "--loss=unfused", 1e-4), ("--share=0.2", "--loss=unfused", 1e-4),
     ("--mass=1", "--compile", 1e-5), ("--mass=1", "--dtype=bfloat16", 2e-2)],
)  # fmt: skip
def test_another_path_gives_the_same_curve(curve, target, path, tolerance, monkeypatch) -> None:
    """Over four steps of Adam, to rounding. Compiled with ATen's operators, to one graph."""
    compiled = Mock(side_effect=partial(torch.compile, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", compiled)
    losses, expected = curve(target, path), curve(target)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses != expected or path != "--dtype=bfloat16"
    assert compiled.call_count == (path == "--compile")


def test_a_bad_option_is_one_line_and_leaves_nothing(small_start, tmp_path, monkeypatch) -> None:
    """The line names the option or the value."""
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("too short")
    config = GPT2Config(vocab_size=503, n_positions=128, n_embd=64, n_layer=1, n_head=1)
    save_weights(GPT2(config).state_dict(), "OTHER")
    before = set(tmp_path.rglob("*"))
    for options in (
        "--steps=0", "--batch=0", "--length=129", "--lr=nan", "--lr=-1", "--seed=-1",
        f"--seed={2**63}", "--eval-every=-1", "--mass=0.01", "--share=1", "--share=nan",
        "--mass=0.5 --share=0.2", "--tokens=(", "--tokens=XQZJ", "--dtype=tf32",
        "--model=/no/such", "--model=OTHER", "--inputs=/no/such", "--inputs=SHORT",
        "--out=/proc/nowhere", "--out=~nobody-there/x",
    ):  # fmt: skip
        words = {"--model": str(small_start), "--out": "out"}
        words |= dict(word.split("=") for word in options.split())
        with pytest.raises(SystemExit, match=r"^error: .*") as stopped:
            quick_run.command([f"{name}={value}" for name, value in words.items()])
        message = str(stopped.value)
        assert any(piece in message for piece in options.split()[0].split("=")), options
        assert "\n" not in message
        assert set(tmp_path.rglob("*")) == before, options


def test_a_copy_runs_as_the_command_does(small_start, tmp_path, monkeypatch, capsys) -> None:
    """Of xfactor.py, under another name: it ends with a report and what to do next."""
    copy = shutil.copy(xfactor.__file__, tmp_path / "my_experiment.py")
    out = tmp_path / "run"
    size = ["--steps", "2", "--batch", "2", "--length", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["my_experiment", "--model", str(small_start), *size])
    monkeypatch.setattr(figures, "draw", lambda *_: b"drawn")
    monkeypatch.setattr("train.run.FULL", 1)
    monkeypatch.setattr("train.evaluate.NEW_TOKENS", 2)
    runpy.run_path(copy, run_name="__main__")
    printed = capsys.readouterr().out
    assert f"wrote {out / 'report.html'}" in printed
    assert printed.endswith(f"\n    python -m train.sample --model {shlex.quote(str(out))}\n")
    about = json.loads((out / "config.json").read_text())["xfactor"]
    assert about["goal"] == "984 tokens that match '[Xx]'"
    assert len(about["target_token_ids"]) == 984
    assert about["alpha"] == pytest.approx(1 / 984)
