"""The share: the bias that gives it, against closed forms in float64, and runs that reach it."""

import json
import math
from pathlib import Path

import pytest
import torch

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.train import quick_run
from train.share import solve, target_mass
from train.target_tokens import matching
from train.xfactor import Options, get_batch
from weights import load_weights

MASK = matching(load_tokenizer(), "[Xx]")


def tilted(m: torch.Tensor, g: float) -> torch.Tensor:
    """Return the probability of the target tokens under the tilted start model."""
    return m * math.exp(g) / (1 - m + m * math.exp(g))


@pytest.mark.parametrize(("m", "share"), [(0.02, 0.2), (0.5, 0.2), (1e-9, 0.999)])
def test_equal_masses_have_the_g_of_the_closed_form(m: float, share: float) -> None:
    """G = logit(S) - logit(m), negative where S is below m."""
    g = solve(torch.full((7,), m, dtype=torch.float64), share)
    expected = math.log(share / (1 - share)) - math.log(m / (1 - m))
    assert g == pytest.approx(expected, abs=1e-9)


def test_the_mean_over_positions_is_the_share() -> None:
    """Of masses that differ, 0 and 1 among them."""
    m = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    m[:2] = torch.tensor([0.0, 1.0])
    for share in (0.01, 0.5, 0.9):
        assert tilted(m, solve(m, share)).mean().item() == pytest.approx(share, abs=1e-9)


def test_a_run_starts_at_the_closed_form_and_reaches_its_share(
    small_start: Path, tmp_path: Path
) -> None:
    """Before an update KL = G p - log(1 - m + m e^G), p and m as in share.py, in float64; 25 steps
    later the model has the mass p, whatever the rate."""
    start = GPT2.from_state_dict(load_weights(small_start))
    tokens = get_batch(Options(batch=2, length=16), None, 0, torch.device("cpu"))
    m = target_mass(start, tokens, MASK)
    exact = start.double()(tokens).detach().softmax(-1)[..., MASK].sum(-1).flatten()
    torch.testing.assert_close(m, exact, rtol=1e-5, atol=0)
    for lr in ("3e-3", "1e-2"):
        size = ["--batch", "2", "--length", "16", "--steps", "25", "--lr", lr, "--inputs", "random"]
        out = tmp_path / lr
        quick_run.command(["--model", str(small_start), *size, "--share", "0.3", "--out", str(out)])
        about = json.loads((out / "config.json").read_text())["xfactor"]
        p = tilted(exact, g := about["g"])
        expected = (g * p - torch.log(1 - exact + exact * math.exp(g))).mean().item()
        assert quick_run.losses(out)[0] == pytest.approx(expected, rel=1e-3)
        ended = target_mass(GPT2.from_state_dict(load_weights(out)), tokens, MASK)
        assert ended.mean().item() == pytest.approx(p.mean().item(), abs=0.06)
        assert about["share"] == 0.3
        assert [line["step"] for line in quick_run.logged(out) if "limit" in line] == [0]


@pytest.mark.parametrize("options", [["--share", "0.2"], ["--inputs", "samples"]], ids=" ".join)
def test_a_run_on_samples_continues_on_the_same_text(
    options: list[str], small_command: list[str], tmp_path: Path
) -> None:
    """Sampled once: stopped after every step, it is the run that was never stopped."""
    command = [*small_command, *options]
    quick_run.command([*command, "--out", str(tmp_path / "whole")])
    for steps in "124":
        command[command.index("--steps") + 1] = steps
        quick_run.command([*command, "--out", str(tmp_path / "run")])
    assert quick_run.losses(tmp_path / "run") == quick_run.losses(tmp_path / "whole")
