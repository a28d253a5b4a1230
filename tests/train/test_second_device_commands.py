"""Whole commands on the second device: every path that a user's GPU takes, against the CPU's files.

The losses take PyTorch's path here, so that results are the CPU's bit for bit; one test runs the
compiled Triton kernels.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import kernels.arguments
import kernels.benchmark
import train.evaluate
import train.inputs
import train.report.figures
import train.run
import train.sample
import train.xfactor
from tests.second_device import second_device

CASES = {
    "two-level": [],
    "two-level, bfloat16": ["--dtype", "bfloat16", "--mass", "0.5"],
    "unfused": ["--loss", "unfused"],
    "share": ["--share", "0.2"],
    "share, bfloat16": ["--share", "0.2", "--dtype", "bfloat16"],
}
# Where a run may wait for the device, each a piece of the line that does.
WAITS = {
    "before the first step": (
        "GPT2.from_state_dict(start.state_dict()).to(device)",
        "start.to(device)",
        "x.to(device) for x in tokens",
        "self.parts.levels.to(device",
        "target.index.tolist()",
        "sampled.flatten().cpu()",
        "log_p[..., mask]",
        ".mean() < share",
    ),
    "logging": ("ranks.mean(torch.stack(self.losses)).tolist()",),
    "saving": ("p.isfinite().all()", "torch.save(state, file)", "p.detach().cpu().contiguous()"),
    "evaluation": (
        "torch.tensor([tokenizer.encode(",
        "bool(((tokens < 0) | (tokens >= V)).any())",
        ".item()",
        "pairs.unique(dim=0)",
        "samples.tolist()",
    ),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluate 4 texts of 2 tokens, train on 4 texts of 16, draw empty pictures."""
    monkeypatch.setattr(train.report.figures, "draw", lambda *_: b"")
    for name in ("FULL", "SHORT"):
        monkeypatch.setattr(train.run, name, 1)
    monkeypatch.setattr(train.evaluate, "NEW_TOKENS", 2)
    for name, value in {"TEXTS": 4, "TOKENS": 16, "BATCH": 2}.items():
        monkeypatch.setattr(train.inputs, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def xfactor(start: Path, out: Path, *arguments: str, steps: int = 4, length: int = 8) -> None:
    """Run the experiment in this process."""
    size = ["--steps", str(steps), "--batch", "2", "--length", str(length), "--lr", "1e-2"]
    words = ["xfactor", "--model", str(start), *size, *arguments, "--out", str(out)]
    with patch.object(sys, "argv", words):
        train.xfactor.main()


def on_gpu(triton: bool = False) -> Any:
    """Return a context for a machine with a GPU, whose losses take PyTorch's path or Triton's."""
    device = second_device()
    if not triton:
        path = patch.object(kernels.arguments, "resolve_impl", lambda *_: "torch")
        path.start()
    return device


@pytest.fixture(autouse=True)
def paths_are_put_back() -> Iterator[None]:
    yield
    patch.stopall()


def read(out: Path) -> dict[str, Any]:
    """Return all that a run wrote, without times and the device's name."""
    config = json.loads((out / "config.json").read_text())
    config["xfactor"] |= {"device": "", "options": config["xfactor"]["options"] | {"out": ""}}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = torch.load(out / "state.pt", "cpu", weights_only=True)
    return {
        "config": config,
        "log": [{k: v for k, v in line.items() if k != "seconds"} for line in log],
        "samples": (out / "samples.jsonl").read_text(),
        "weights": (out / "model.safetensors").read_bytes(),
        "adam": [p.numpy().tobytes() for adam in state["adam"].values() for p in adam.values()],
        "files": sorted(path.name for path in out.iterdir()),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_writes_the_files_of_a_cpu(case: str, small_start: Path, tmp_path: Path) -> None:
    """Log, samples, weights and Adam's state bit for bit, and the report, with either target."""
    xfactor(small_start, tmp_path / "cpu", *CASES[case])
    with on_gpu():
        xfactor(small_start, tmp_path / "gpu", *CASES[case])
    assert read(tmp_path / "gpu") == read(tmp_path / "cpu")


def test_a_run_that_is_stopped_on_a_gpu_continues_to_the_files_of_a_cpu(
    small_start: Path, tmp_path: Path
) -> None:
    """Ctrl-C in step 2 saves it; the same command goes on."""
    xfactor(small_start, tmp_path / "cpu", "--share", "0.3")
    get_batch = train.xfactor.get_batch

    def interrupted(options: Any, text: Any, step: int, device: torch.device) -> Any:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return get_batch(options, text, step, device)

    with on_gpu():
        with (
            patch.object(train.xfactor, "get_batch", interrupted),
            pytest.raises(SystemExit) as stopped,
        ):
            xfactor(small_start, tmp_path / "gpu", "--share", "0.3")
        assert stopped.value.code == 128 + signal.SIGINT
        xfactor(small_start, tmp_path / "gpu", "--share", "0.3")
    assert read(tmp_path / "gpu") == read(tmp_path / "cpu")


@pytest.mark.parametrize("case", ["two-level, bfloat16", "share"])
def test_no_step_waits_for_the_device(case: str, small_start: Path, tmp_path: Path) -> None:
    """Neither ids, forward, loss, backward nor Adam; all other waits are on the list."""
    with on_gpu() as gpu:
        get_batch, waits = train.xfactor.get_batch, []

        def counting(*arguments: Any) -> Any:
            waits.append(sum(gpu.waits().values()))
            return get_batch(*arguments)

        with patch.object(train.xfactor, "get_batch", counting):
            xfactor(small_start, tmp_path / "run", *CASES[case])
    assert len(waits) == 4
    assert len(set(waits)) == 1  # none between the first step's ids and the last one's
    known = [piece for pieces in WAITS.values() for piece in pieces]
    assert not [line for line in gpu.waits() if not any(piece in line for piece in known)]


def test_the_dispatch_takes_the_compiled_triton_kernels(small_start: Path, tmp_path: Path) -> None:
    """For both targets: their PTX is executed, and the losses are the CPU's but for rounding."""
    pytest.importorskip("triton")
    for name, options in {"two-level": [], "share": ["--share", "0.2"]}.items():
        xfactor(small_start, tmp_path / f"cpu-{name}", *options, steps=1, length=2)
        with on_gpu(triton=True) as gpu:
            xfactor(small_start, tmp_path / f"gpu-{name}", *options, steps=1, length=2)
        assert gpu.launches()["triton"] >= 2
        got, expected = (read(tmp_path / f"{where}-{name}")["log"] for where in ("gpu", "cpu"))
        assert got[-2]["loss"] == pytest.approx(expected[-2]["loss"], rel=1e-5)


def test_a_gpu_samples_the_text_of_a_cpu(
    small_start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = train.sample.Options(model=str(small_start), length=8, top_k=50)
    texts = []
    for where in (nullcontext(), on_gpu()):
        with where:
            train.sample.sample(options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
