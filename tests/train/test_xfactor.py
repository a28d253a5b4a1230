"""The experiment on a small model: the curves that a run must have, and the options it refuses."""

import json
import math
import re
import shutil
import subprocess
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
from train.target_tokens import make_target, matching
from train.xfactor import Options, get_batch
from weights import load_weights, save_weights

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Curve = Callable[..., list[float]]


@pytest.fixture
def curve(small_start: Path, tmp_path: Path) -> Curve:
    """A run of the command in this process; returns its losses."""

    def run(*options: str, lr: str = "1e-3", steps: int = 8) -> list[float]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        size = ["--batch", "2", "--length", "16", "--steps", str(steps), "--lr", lr]
        quick_run.command(["--model", str(small_start), *size, "--out", str(out), *options])
        losses = quick_run.losses(out)
        assert len(losses) == steps
        return losses

    return run


def test_the_loss_falls_from_its_closed_form_to_a_collapse(curve: Curve) -> None:
    """A random model starts near ln(V / |S|), the divergence of the uniform distribution."""
    losses = curve(lr="1e-2", steps=25)
    assert losses[0] == pytest.approx(math.log(50257 / 984), abs=0.1)
    assert losses[-1] < 0.05


def test_a_rate_of_0_changes_nothing_and_step_n_has_the_batch_n(
    curve: Curve, small_start: Path
) -> None:
    """Each loss is the start's in float64, on a batch that seed and step alone decide."""
    start = GPT2.from_state_dict(load_weights(small_start)).double()
    target = make_target(matching(load_tokenizer(), "[Xx]"))
    for step, loss in enumerate(curve("--seed", "5", lr="0", steps=3)):
        tokens = get_batch(Options(batch=2, length=16, seed=5), None, step, CPU)
        with torch.no_grad():
            assert loss == pytest.approx(kl_div(start(tokens), target).item(), rel=1e-5)


def test_inputs_cover_the_vocabulary_and_windows_lie_in_the_text() -> None:
    """Both ends occur; every window is a piece of the text, the first and the last included;
    another seed or step gives other ids."""
    options = Options(batch=8192, length=64)
    ids = get_batch(options, None, 0, CPU)
    assert (ids.min(), ids.max()) == (0, 50256)
    assert torch.equal(ids, get_batch(options, None, 0, CPU))
    for other in (
        get_batch(options, None, 1, CPU),
        get_batch(replace(options, seed=1), None, 0, CPU),
    ):
        assert (ids == other).float().mean() < 0.01
    windows = get_batch(Options(batch=64, length=8), torch.arange(100, 110), 0, CPU)
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {100, 101, 102}


@pytest.mark.parametrize("target", [["--mass", "0.9"], ["--share", "0.2"]], ids=" ".join)
def test_the_fused_and_the_unfused_loss_give_the_same_curve(curve: Curve, target) -> None:
    """Over 8 steps of Adam, to rounding."""
    assert curve(*target) == pytest.approx(curve(*target, "--loss", "unfused"), rel=1e-4)


def test_the_forward_compiles_to_one_graph_and_gives_the_same_curve(curve, monkeypatch) -> None:
    """Compiled with ATen's operators: no break, no other value."""
    eager = curve(steps=4)
    compile_eagerly = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    assert curve("--compile", steps=4) == pytest.approx(eager, rel=1e-5)


def test_bfloat16_follows_float32(curve: Curve) -> None:
    """Autocast rounds the products; weights and loss stay float32."""
    reference, losses = curve(), curve("--dtype", "bfloat16")
    assert losses == pytest.approx(reference, rel=2e-2)
    assert losses != reference


BAD_OPTIONS = ["--steps=0", "--batch=0", "--length=129", "--lr=nan", "--lr=-1", "--seed=-1",
               f"--seed={2**63}", "--eval-every=-1", "--mass=0.01", "--share=1", "--share=nan",
               "--mass=0.5 --share=0.2", "--tokens=(", "--tokens=XQZJ", "--dtype=tf32",
               "--model=/no/such", "--model=OTHER", "--inputs=/no/such", "--inputs=SHORT",
               "--out=/proc/nowhere", "--out=~nobody-there/x"]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_leaves_nothing(
    options: str, small_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the option or the value."""
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("too short")
    if options == "--model=OTHER":
        config = GPT2Config(vocab_size=503, n_positions=128, n_embd=64, n_layer=1, n_head=1)
        save_weights(GPT2(config).state_dict(), "OTHER")
    before = set(tmp_path.rglob("*"))
    words = {"--model": str(small_start), "--out": "out"}
    words |= dict(word.split("=") for word in options.split())
    with pytest.raises(SystemExit, match="error: ") as stopped:
        quick_run.command([f"{name}={value}" for name, value in words.items()])
    message = str(stopped.value)
    assert any(piece in message for piece in options.split()[0].split("="))
    assert "\n" not in message
    assert set(tmp_path.rglob("*")) == before


MEMORY = {
    "CUDA out of memory. Tried to allocate 1 GiB.\nSee more": True,
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nframe": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)": True,
    "CUDA error: an illegal memory access was encountered": False,
}


@pytest.mark.parametrize("message", MEMORY)
def test_too_little_memory_is_one_line_and_a_fault_of_the_program_a_traceback(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what takes less; the messages go on about the allocator."""
    monkeypatch.setattr(xfactor, "experiment", Mock(side_effect=RuntimeError(message)))
    with pytest.raises((SystemExit, RuntimeError)) as ended:
        quick_run.command(["--out", str(tmp_path)])
    one_line = re.fullmatch("error: .* Give a smaller --batch, .*", str(ended.value))
    assert bool(one_line) == (ended.type is SystemExit) == MEMORY[message]


def test_an_experiment_of_ones_own_runs_as_the_command_does(
    small_start: Path, tmp_path: Path
) -> None:
    """train/my_experiment.py in a copy of the project, as a user starts it: it ends with a report.
    `python -m train` says which commands there are."""
    for name in ("train", "model", "kernels", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train" / "xfactor.py", tmp_path / "train" / "my_experiment.py")
    evaluate = tmp_path / "train" / "evaluate.py"
    evaluate.write_text(evaluate.read_text().replace("FULL, SHORT = 16, 4", "FULL, SHORT = 1, 1"))
    size = ["--steps", "2", "--batch", "2", "--length", "8", "--out", "run"]
    experiment = ["train.my_experiment", "--model", small_start, *size]
    done, none = (
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
        for words in (experiment, ["train"])
    )
    assert done.returncode == 0, done.stderr
    assert "python -m train.xfactor; the others: " in none.stderr
    assert "wrote run/report.html" in done.stdout
    about = json.loads((tmp_path / "run" / "config.json").read_text())["xfactor"]
    assert about["goal"].startswith("984 ")
    assert len(about["target_token_ids"]) == 984
    assert about["alpha"] == pytest.approx(1 / 984)
