"""The experiment on the embedded checkpoint's architecture: what a run must do, and must refuse."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import TwoLevelTarget
from kernels.reference import kl_div
from model import GPT2, GPT2Config
from train.inputs import Inputs
from train.xfactor import LOSSES, Options, check, training_steps
from weights import save_weights

ROOT = Path(__file__).parents[2]
CONFIG = GPT2Config(vocab_size=503, n_positions=32, n_embd=64, n_layer=2, n_head=1)
MEMBERS = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
MEMBERS[::29] = True  # 18 of 503
CPU = torch.device("cpu")


def curve(
    loss: str = "linear",
    lr: float = 1e-2,
    steps: int = 12,
    beta: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """Losses and masses of a run on a small model with fixed initial weights."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    target = TwoLevelTarget(MEMBERS, 1.0, beta)
    inputs = Inputs(CONFIG.vocab_size, 2, 16, seed, CPU)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    turns = training_steps(model, optimizer, target, inputs.draw, LOSSES[loss], dtype)
    results = [next(turns) for _ in range(steps)]
    losses, masses = torch.tensor(results).T.tolist()
    return losses, masses


def test_the_loss_falls_from_its_closed_form_to_a_collapse() -> None:
    """A random model starts near ln(V / |S|), the divergence of the uniform distribution."""
    losses, masses = curve(steps=40)
    assert losses[0] == pytest.approx(math.log(503 / 18), abs=0.1)
    assert masses[0] == pytest.approx(18 / 503, abs=0.01)
    assert losses[-1] < 0.05
    assert masses[-1] > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_mass_on_the_members_is_at_least_exp_of_minus_the_loss(dtype: torch.dtype) -> None:
    """At every step, the two computed by different code; bfloat16 may round by 1 %."""
    losses, masses = curve(steps=30, dtype=dtype)
    slack = 1e-5 if dtype == torch.float32 else 1e-2
    for loss, mass in zip(losses, masses, strict=True):
        assert mass >= math.exp(-loss) - slack


def test_the_forward_compiles_to_one_graph_and_gives_the_same_curve() -> None:
    """Against the eager one, by a compiler that keeps ATen's operators: no break, no other value.
    The attention of a step is chosen outside of the graph."""
    results = []
    for wrap in (lambda f: f, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        model = GPT2(CONFIG)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        target, draw = TwoLevelTarget(MEMBERS), Inputs(CONFIG.vocab_size, 2, 16, 0, CPU).draw
        forward = wrap(model.hidden_states)
        steps = training_steps(
            model, optimizer, target, draw, LOSSES["linear"], hidden_states=forward
        )
        results.append([next(steps)[0].item() for _ in range(4)])
    eager, compiled = results
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are CUDA's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_never_waits_for_the_device(dtype: torch.dtype) -> None:
    """After two steps that compile and fill caches; CUDA itself raises at a wait."""
    device = torch.device("cuda")
    model = GPT2(CONFIG).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    target = TwoLevelTarget(MEMBERS).to(device)
    draw = Inputs(CONFIG.vocab_size, 2, 16, 0, device).draw
    steps = training_steps(model, optimizer, target, draw, LOSSES["linear"], dtype)
    next(steps), next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_seed_gives_the_same_curve_bit_for_bit() -> None:
    """Against a second run, and against another seed, which must differ."""
    assert curve() == curve()
    assert curve()[0] != curve(seed=1)[0]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_three_losses_give_the_same_curve(beta: float) -> None:
    """Fused with the LM head, fused, and unfused, over 12 steps of Adam, to rounding."""
    unfused, masses = curve("unfused", lr=1e-3, beta=beta)
    for loss in ("linear", "fused"):
        losses, same = curve(loss, lr=1e-3, beta=beta)
        assert losses == pytest.approx(unfused, rel=1e-4)
        assert same == pytest.approx(masses, rel=1e-3)


def test_bfloat16_follows_float32_and_keeps_float32_weights() -> None:
    """Autocast: the products round, the weights and the loss do not."""
    reference, _ = curve(lr=1e-3)
    losses, _ = curve(lr=1e-3, dtype=torch.bfloat16)
    assert losses == pytest.approx(reference, rel=2e-2)
    assert losses != reference


def test_a_rate_of_zero_changes_nothing() -> None:
    """The loss of one fixed batch stays what it is: only Adam moves the weights."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    tokens = torch.randint(CONFIG.vocab_size, (2, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    target = TwoLevelTarget(MEMBERS)
    turns = training_steps(model, optimizer, target, lambda: tokens, LOSSES["linear"])
    expected = kl_div(model(tokens), target)
    for _ in range(3):
        torch.testing.assert_close(next(turns)[0], expected.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_step_runs_on_the_meta_device(loss: str) -> None:
    """No tensor is pinned to the CPU, where mixing it with a meta tensor would raise."""
    with torch.device("meta"):
        model = GPT2(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # the fused one knows no meta
    target = TwoLevelTarget(MEMBERS).to("meta")
    inputs = Inputs(CONFIG.vocab_size, 2, 16, 0, torch.device("meta"))
    turns = training_steps(model, optimizer, target, inputs.draw, LOSSES[loss])
    for value in next(turns):
        assert value.is_meta
        assert value.shape == ()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_random_inputs_cover_the_vocabulary_and_windows_lie_in_the_text() -> None:
    """Both ends occur; every window is a run of the text, the first and the last included."""
    ids = torch.cat([Inputs(50, 8, 64, seed, CPU).draw().flatten() for seed in range(4)])
    assert set(ids.tolist()) == set(range(50))
    text = torch.arange(100, 110)
    inputs = Inputs(50, 64, 8, 0, CPU, text)
    windows = inputs.draw()
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {100, 101, 102}


BAD_OPTIONS = {
    "letter": (["--letter", "XQZJ"], "no token contains 'XQZJ'"),
    "alpha": (["--alpha", "1", "--beta", "1"], "alpha"),
    "length": (["--length", "129"], "128 positions"),
    "rate": (["--lr", "-1e-4"], "--lr"),
    "rate nan": (["--lr", "nan"], "--lr"),
    "steps": (["--steps", "0"], "--steps"),
    "out": (["--out", "/proc/nowhere"], "/proc/nowhere"),
    "text": (["--inputs", "SHORT"], "expected at least one window of 64"),
    "no text": (["--inputs", "/no/such/file"], "/no/such/file"),
    "weights": (["--weights", "/no/such/weights"], "/no/such/weights"),
    "vocabulary": (["--weights", "OTHER"], "a vocabulary of 503 tokens, expected GPT-2's 50257"),
    "context": (["--weights", "SHORT CONTEXT"], "64 positions, expected at least"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_before_any_model_is_loaded(
    case: str, small_start: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The line names the option or the value; loading a model here would be an AssertionError."""
    from train import xfactor

    def loaded(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(xfactor, "load_weights", loaded)
    files = {name: str(tmp_path / name) for name in ("SHORT", "OTHER", "SHORT CONTEXT")}
    Path(files["SHORT"]).write_text("too short")
    save_weights(GPT2(dataclasses.replace(CONFIG, n_positions=64)).state_dict(), files["OTHER"])
    short = GPT2Config(n_positions=64, n_embd=64, n_layer=1, n_head=1)
    save_weights(GPT2(short).state_dict(), files["SHORT CONTEXT"])
    arguments, message = BAD_OPTIONS[case]
    arguments = [files.get(a, a) for a in arguments]
    base = ["--weights", str(small_start), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["xfactor", *base, *arguments])
    with pytest.raises(SystemExit) as stopped:
        xfactor.main()
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_too_little_memory_is_one_line_that_says_what_takes_less(monkeypatch) -> None:
    """CUDA's own message goes on for lines about its allocator."""
    from train import xfactor

    def exhausted(options: Options) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nSee more")

    monkeypatch.setattr(xfactor, "experiment", exhausted)
    monkeypatch.setattr(sys, "argv", ["xfactor"])
    with pytest.raises(SystemExit, match=r"error: CUDA .* Try a smaller --batch, .*$") as stopped:
        xfactor.main()
    assert "\n" not in str(stopped.value)


def test_check_accepts_the_defaults_without_a_network(monkeypatch, tmp_path: Path) -> None:
    """gpt2-medium's sizes are on record: nothing is fetched to check the options."""
    check(dataclasses.replace(Options(), out=tmp_path))


def test_the_command_ends_with_table_samples_and_curves(small_start: Path, tmp_path: Path) -> None:
    """Two rates in a subprocess, as a user runs them: what is printed, and what is on disk."""
    arguments = ["--weights", small_start, "--lr", "1e-5", "1e-2", "--steps", "4", "--batch", "2"]
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
    assert "| learning rate |" in done.stdout
    assert "'Once upon a time'" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report.html") in done.stdout
    for name in ("lr-1e-05", "lr-0.01"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        assert steps == [1, 2, 3, 4]
