"""The experiment on a small model: the curves that a run must have, and the options it refuses."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train.evaluate
from kernels.reference import kl_div
from model import GPT2, GPT2Config
from model.tokenizer import load_tokenizer
from train import xfactor
from train.target_tokens import containing, make_target
from train.xfactor import Options, get_batch
from weights import load_weights, save_weights

ROOT = Path(__file__).parents[2]
SMALL = GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1)  # `small_start`
Curve = tuple[list[float], list[float]]


@pytest.fixture
def curve(small_start: Path, tmp_path: Path, monkeypatch) -> Callable[..., Curve]:
    """A run of the command in this process; returns its losses and target probabilities."""
    monkeypatch.setattr(train.evaluate, "NEW_TOKENS", 2)
    monkeypatch.setattr(train.evaluate, "SAMPLES", 1)
    monkeypatch.setattr(train.console, "report", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*options: str, lr: str = "1e-2", steps: int = 12) -> Curve:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        size = ["--batch", "2", "--length", "16", "--steps", str(steps), "--lr", lr]
        command = ["xfactor", "--weights", str(small_start), *size, "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", command)
        xfactor.main()
        (log,) = out.glob("*/metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        steps_logged = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps_logged] == list(range(1, steps + 1))
        losses = [line["loss"] for line in steps_logged]
        return losses, [line["target_probability"] for line in steps_logged]

    return run


def test_the_loss_falls_from_its_closed_form_to_a_collapse(curve) -> None:
    """A random model starts near ln(V / |S|), the divergence of the uniform distribution."""
    losses, probabilities = curve(steps=40)
    assert losses[0] == pytest.approx(math.log(50257 / 984), abs=0.1)
    assert probabilities[0] == pytest.approx(984 / 50257, abs=0.01)
    assert losses[-1] < 0.05
    assert probabilities[-1] > 0.95


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_target_probability_is_at_least_exp_of_minus_the_loss(curve, dtype: str) -> None:
    """At every step, the two computed by different code; bfloat16 may round by 1 %."""
    losses, probabilities = curve("--dtype", dtype, steps=30)
    slack = 1e-5 if dtype == "float32" else 1e-2
    for loss, probability in zip(losses, probabilities, strict=True):
        assert probability >= math.exp(-loss) - slack


def test_the_forward_compiles_to_one_graph_and_gives_the_same_curve(curve, monkeypatch) -> None:
    """Against the eager one, compiled with ATen's operators: no break, no other value."""
    eager, _ = curve(lr="1e-3", steps=4)
    compile_eagerly = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    compiled, _ = curve("--compile", lr="1e-3", steps=4)
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA can raise at a wait")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_device(dtype: str, small_start, tmp_path, monkeypatch) -> None:
    """From the second step on, between two logs: CUDA itself raises at a wait."""
    drawn = 0

    def watched(options: Options, *rest: object) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        torch.cuda.set_sync_debug_mode("error" if 2 < drawn < 6 else "default")
        return get_batch(options, *rest)

    monkeypatch.setattr(xfactor, "get_batch", watched)
    monkeypatch.setattr(train.console, "interval", lambda bar: math.inf)
    size = ["--batch", "2", "--length", "16", "--steps", "6", "--dtype", dtype]
    command = ["xfactor", "--weights", str(small_start), *size, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    xfactor.main()
    assert drawn == 6


def test_the_same_seed_gives_the_same_curve_bit_for_bit(curve) -> None:
    """Against a second run, and against another seed, which must differ."""
    assert curve() == curve()
    assert curve()[0] != curve("--seed", "1")[0]


@pytest.mark.parametrize("beta", ["0", "0.1"])
def test_the_three_losses_give_the_same_curve(curve, beta: str) -> None:
    """Fused with the LM head, fused, and unfused, over 12 steps of Adam, to rounding."""
    unfused, expected = curve("--loss", "unfused", "--beta", beta, lr="1e-3")
    for loss in ("linear", "fused"):
        losses, probabilities = curve("--loss", loss, "--beta", beta, lr="1e-3")
        assert losses == pytest.approx(unfused, rel=1e-4)
        assert probabilities == pytest.approx(expected, rel=1e-3)


def test_bfloat16_follows_float32_and_keeps_float32_weights(curve, tmp_path: Path) -> None:
    """Autocast: the products round, the weights and the loss do not."""
    reference, _ = curve(lr="1e-3")
    losses, _ = curve("--dtype", "bfloat16", lr="1e-3")
    assert losses == pytest.approx(reference, rel=2e-2)
    assert losses != reference


def test_a_learning_rate_of_zero_changes_nothing(curve, small_start: Path) -> None:
    """Each loss is that of the start, against the definition: only Adam moves the weights."""
    losses, _ = curve(lr="0", steps=3)
    start, generator = GPT2.from_state_dict(load_weights(small_start)), torch.Generator()
    target = make_target(containing(load_tokenizer(), "X"))
    options, generator = Options(batch=2, length=16), generator.manual_seed(0)
    for loss in losses:
        with torch.no_grad():
            expected = kl_div(start(get_batch(options, None, generator)), target)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_random_inputs_cover_the_vocabulary_and_windows_lie_in_the_text() -> None:
    """Both ends occur; every window is a piece of the text, the first and the last included."""
    ids = get_batch(Options(batch=8192, length=64), None, torch.Generator().manual_seed(0))
    assert ids.min() == 0
    assert ids.max() == 50256
    assert len(ids.unique()) > 0.99 * 50257
    text = torch.arange(100, 110)
    windows = get_batch(Options(batch=64, length=8), text, torch.Generator().manual_seed(0))
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {100, 101, 102}


BAD_OPTIONS = {
    "letter": (["--letter", "XQZJ"], "no token contains 'XQZJ'"),
    "alpha": (["--alpha", "1", "--beta", "1"], "alpha"),
    "length": (["--length", "129"], "128 positions"),
    "rate": (["--lr", "-1e-4"], "--lr"),
    "rate nan": (["--lr", "nan"], "--lr"),
    "rate twice": (["--lr", "1e-4", "1e-4"], "each value once"),
    "steps": (["--steps", "0"], "--steps 0"),
    "no rate": (["--lr"], "--lr ()"),
    "no tilt": (["--tilt"], "--tilt ()"),
    "no strength": (["--tilt", "3", "--contains", "x", "--strength"], "--strength ()"),
    "seed": (["--seed", "-1"], "--seed -1"),
    "large seed": (["--seed", str(2**63)], "--seed"),
    "batch": (["--batch", "1000000000"], "--batch 1000000000"),
    "out": (["--out", "/proc/nowhere"], "/proc/nowhere"),
    "not text": (["--out", "\udcff"], "'\\udcff': expected a name in UTF-8"),
    "user": (["--out", "~nobody-there/x"], "~nobody-there"),
    "long": (["--out", "x" * 300], "File name too long"),
    "text": (["--inputs", "SHORT"], "expected at least one window of 64"),
    "no text": (["--inputs", "/no/such/file"], "/no/such/file"),
    "weights": (["--weights", "/no/such/weights"], "/no/such/weights"),
    "vocabulary": (["--weights", "OTHER"], "a vocabulary of 503 tokens, expected GPT-2's 50257"),
    "context": (["--weights", "SHORT CONTEXT"], "64 positions, expected at least"),
    "tf32": (["--dtype", "tf32"], "expected cuda"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_before_any_model_is_loaded(
    case: str, small_start: Path, tmp_path: Path, monkeypatch
) -> None:
    """The line names the option or the value, and nothing is left behind; loading a model here
    would be an AssertionError."""

    def loaded(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train.inputs, "load_weights", loaded)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    files = {name: str(tmp_path / name) for name in ("SHORT", "OTHER", "SHORT CONTEXT")}
    Path(files["SHORT"]).write_text("too short")
    other = GPT2Config(vocab_size=503, n_embd=64, n_layer=1, n_head=1)
    save_weights(GPT2(other).state_dict(), files["OTHER"])
    short = dataclasses.replace(SMALL, n_positions=64)
    save_weights(GPT2(short).state_dict(), files["SHORT CONTEXT"])
    before = set(tmp_path.rglob("*"))
    arguments, message = BAD_OPTIONS[case]
    arguments = [files.get(a, a) for a in arguments]
    base = ["--weights", str(small_start), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["xfactor", *base, *arguments])
    with pytest.raises(SystemExit) as stopped:
        xfactor.main()
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert set(tmp_path.rglob("*")) == before


def cuda_exhausted(options: Options) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nSee more")


def cpu_exhausted(options: Options) -> None:
    torch.empty(2**60, dtype=torch.int8)


@pytest.mark.parametrize("exhausted", [cuda_exhausted, cpu_exhausted])
def test_too_little_memory_is_one_line_that_says_what_takes_less(exhausted, monkeypatch) -> None:
    """The messages of both go on for lines about the allocator."""
    monkeypatch.setattr(xfactor, "experiment", exhausted)
    monkeypatch.setattr(sys, "argv", ["xfactor"])
    with pytest.raises(SystemExit, match=r"^error: .* Try a smaller --batch, .*$") as stopped:
        xfactor.main()
    assert "\n" not in str(stopped.value)


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch) -> None:
    """Also one that speaks of memory."""
    message = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(xfactor, "experiment", Mock(side_effect=RuntimeError(message)))
    monkeypatch.setattr(sys, "argv", ["xfactor"])
    with pytest.raises(RuntimeError, match=message):
        xfactor.main()


def test_the_defaults_are_accepted_without_a_network() -> None:
    """gpt2-medium's sizes are on record: nothing is fetched to check the options."""
    assert train.inputs.check(Options(), torch.device("cpu")).n_layer == 24


def test_the_command_ends_with_table_samples_and_curves(small_start: Path, tmp_path: Path) -> None:
    """Two rates in a subprocess, as a user runs them: what is printed, and what is on disk."""
    arguments = ["--weights", small_start, "--lr", "1e-2", "1e-5", "--steps", "4", "--batch", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "train.xfactor", *arguments, "--length", "8", "--out", tmp_path],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loss: linear (PyTorch path)" in done.stdout
    assert "984 of 50257 tokens" in done.stdout
    assert "evaluating the model before fine-tuning" in done.stdout
    assert "Once upon a time" in done.stdout
    assert str(tmp_path / "report.html") in done.stdout
    assert "lr-0.01: step 4 of 4, loss " in done.stderr
    assert "\r" not in done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
