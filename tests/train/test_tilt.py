"""The dial: the target is the start model's own distribution, tilted toward the target tokens."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.evaluate
from model import GPT2
from model.tokenizer import load_tokenizer
from train import xfactor
from train.target_tokens import containing
from train.xfactor import Options, get_batch
from weights import load_weights

Lines = list[dict[str, float]]


@pytest.fixture
def tilted(small_start: Path, tmp_path: Path, monkeypatch) -> Callable[..., dict[str, Lines]]:
    """The command in this process; returns the logged steps of each run, by its folder's name."""
    monkeypatch.setattr(train.evaluate, "NEW_TOKENS", 2)
    monkeypatch.setattr(train.evaluate, "SAMPLES", 1)
    monkeypatch.setattr(train.inputs, "TEXTS", 4)
    monkeypatch.setattr(train.inputs, "BATCH", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*options: str) -> dict[str, Lines]:
        size = ["--batch", "2", "--length", "16", "--weights", str(small_start)]
        command = ["xfactor", *size, "--out", str(tmp_path / "run"), *options]
        monkeypatch.setattr(sys, "argv", command)
        xfactor.main()
        runs = {}
        for log in tmp_path.glob("run/*/metrics.jsonl"):
            lines = map(json.loads, log.read_text().splitlines())
            runs[log.parent.name] = [line for line in lines if "loss" in line]
        return runs

    return run


@pytest.fixture(scope="module")
def start(small_start: Path) -> GPT2:
    return GPT2.from_state_dict(load_weights(small_start)).double()


def share(start: GPT2, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The probability m that the start gives the target tokens, at each position, in float64."""
    with torch.no_grad():
        return start(tokens).softmax(-1)[..., mask].sum(-1)


@pytest.mark.parametrize("loss", ["linear", "fused", "unfused"])
def test_the_first_step_has_the_closed_form(loss: str, tilted, start: GPT2) -> None:
    """Before any update the student is the teacher: with p = m e^G / (1 - m + m e^G) it predicts p,
    has m, and KL = G p - log(1 - m + m e^G); against float64, mean over positions."""
    runs = tilted("--tilt", "3", "--inputs", "random", "--steps", "1", "--loss", loss)
    [first] = runs["tilt-3.0-lr-0.0001"]
    generator = torch.Generator().manual_seed(0)
    tokens = get_batch(Options(batch=2, length=16), None, generator)
    m = share(start, tokens, containing(load_tokenizer(), "X"))
    total = 1 - m + m * math.exp(3)
    p = m * math.exp(3) / total
    assert first["target_probability"] == pytest.approx(m.mean().item(), rel=1e-4)
    assert first["predicted_probability"] == pytest.approx(p.mean().item(), rel=1e-4)
    assert first["loss"] == pytest.approx((3 * p - total.log()).mean().item(), rel=1e-3)


def test_the_dial_decides_and_not_the_learning_rate(tilted) -> None:
    """A run for each G and rate; each ends within 0.06 of what was predicted for it."""
    rates = ["--lr", "3e-3", "1e-2", "--steps", "40"]
    runs = tilted("--tilt", "3", "5", *rates)
    assert set(runs) == {f"tilt-{g}-lr-{lr}" for g in ("3.0", "5.0") for lr in ("0.003", "0.01")}
    ends = {}
    for name, steps in runs.items():
        predicted = steps[-1]["predicted_probability"]
        assert steps[-1]["target_probability"] == pytest.approx(predicted, abs=0.06), name
        ends[name] = predicted
    assert ends["tilt-5.0-lr-0.01"] - ends["tilt-3.0-lr-0.01"] > 0.3


def test_goals_of_different_strength_add_up(tilted, start: GPT2) -> None:
    """b = G times the sum of the strengths of the strings that a token contains; the prediction
    against a softmax in float64."""
    goals = ["--contains", "x", "--contains", "ing", "--strength", "1", "-0.5"]
    size = ["--inputs", "random", "--steps", "1"]
    runs = tilted("--tilt", "2", *goals, *size)
    [first] = runs["tilt-2.0-lr-0.0001"]
    tokenizer, generator = load_tokenizer(), torch.Generator().manual_seed(0)
    x, ing = (containing(tokenizer, s).double() for s in ("x", "ing"))
    tokens = get_batch(Options(batch=2, length=16), None, generator)
    with torch.no_grad():
        p = (start(tokens) + 2 * (x - 0.5 * ing)).softmax(-1)
    predicted = p[..., x > 0.5 * ing].sum(-1).mean()
    assert first["predicted_probability"] == pytest.approx(predicted.item(), rel=1e-4)


def test_the_start_writes_the_text_that_is_trained_on(tilted, tmp_path: Path) -> None:
    """Once, kept beside the runs: each text starts as <|endoftext|>, and a resumed run reads it."""
    tilted("--tilt", "3", "--steps", "2", "--eval-every", "1")
    text = load_file(tmp_path / "run" / "inputs.safetensors")["ids"]
    assert text.shape == (4, 128)
    assert (text[:, 0] == load_tokenizer().eot).all()
    before = (tmp_path / "run" / "inputs.safetensors").stat().st_mtime_ns
    [resumed] = tilted("--resume", str(tmp_path / "run"), "--steps", "4").values()
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "inputs.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contains", "x", "--strength", "2"], "--strength multiplies the G of --tilt"),
        (["--tilt", "3", "--contains", "x", "--strength", "1", "2"], "one per --contains"),
        (["--tilt", "3", "--contains", "x", "--strength", "-1"], "no token is wanted"),
        (["--tilt", "3", "3"], "each value once"),
        (["--tilt", "3", "--beta", "0.1"], "leave out --alpha, --beta and --mass"),
    ],
)
def test_a_tilt_that_makes_no_sense_is_refused(options, message, tilted) -> None:
    """In one line that names the option."""
    with pytest.raises(SystemExit, match=message):
        tilted(*options, "--steps", "1")
