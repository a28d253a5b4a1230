"""Whole commands on the second device: every path that a user's GPU takes, against the CPU's files.

The losses take PyTorch's path here, so that results are the CPU's bit for bit; one test runs the
compiled Triton kernels.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import kernels.arguments
import train.sample
import train.xfactor
from tests.second_device import second_device
from tests.train import quick_run
from tests.train.quick_run import assert_same_run, changed, signalled

CASES = {
    "two-level": {"mass": "0.5"},
    "unfused": {"loss": "unfused"},
    "share, bfloat16": {"share": "0.2", "dtype": "bfloat16"},
}
SELDOM = {"LOG_EVERY": 10, "SAVE_EVERY": 60.0, "PATIENCE": 60.0}  # each waits
# Where a run may wait for the device, each a piece of the line that does.
WAITS = (
    # before the first step
    "GPT2.from_state_dict(start.state_dict()).to(device)",
    "start.to(device)",
    "x.to(device) for x in tokens",
    "self.parts.levels.to(device",
    "target.index.tolist()",
    "sampled.flatten().cpu()",
    "log_p[..., mask]",
    ".mean() < share",
    # logging and saving
    "ranks.mean(torch.stack(self.losses)).tolist()",
    "p.isfinite().all()",
    "torch.save(state, file)",
    "p.detach().cpu().contiguous()",
    # evaluation
    "torch.tensor([tokenizer.encode(",
    "bool(((tokens < 0) | (tokens >= V)).any())",
    ".item()",
    "pairs.unique(dim=0)",
    "samples.tolist()",
)


@contextmanager
def on_gpu() -> Iterator[Any]:
    """Be a machine with a GPU, whose losses take PyTorch's path; yield the device's record."""
    path = patch.object(kernels.arguments, "resolve_impl", lambda *_: "torch")
    with path, second_device() as record:
        yield record


@pytest.fixture
def command(small_command: list[str]) -> list[str]:
    return changed(small_command, eval_every="0")


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_writes_the_files_of_a_cpu_and_no_step_waits(case, command, tmp_path) -> None:
    """Log, samples, weights and Adam's state bit for bit. Neither ids, forward, loss, backward nor
    Adam wait for the device; all other waits are on the list."""
    command, get_batch, waits = changed(command, **CASES[case]), train.xfactor.get_batch, []
    quick_run.command([*command, "--out", str(tmp_path / "cpu")], **SELDOM)
    with on_gpu() as gpu:

        def counting(*arguments: Any) -> Any:
            waits.append(sum(gpu.waits().values()))
            return get_batch(*arguments)

        with patch.object(train.xfactor, "get_batch", counting):
            quick_run.command([*command, "--out", str(tmp_path / "gpu")], **SELDOM)
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("cpu", "gpu")]
    for config in configs:
        config["xfactor"] |= {"device": "", "options": config["xfactor"]["options"] | {"out": ""}}
    assert configs[0] == configs[1]
    assert len(waits) == 4
    assert len(set(waits)) == 1  # none between the first step's ids and the last one's
    assert not [line for line in gpu.waits() if not any(piece in line for piece in WAITS)]


def test_a_run_that_is_stopped_on_a_gpu_continues_to_the_files_of_a_cpu(command, tmp_path) -> None:
    """Ctrl-C in step 2 saves it; the same command goes on."""
    command = changed(command, share="0.3")
    quick_run.command([*command, "--out", str(tmp_path / "cpu")])
    command += ["--out", str(tmp_path / "gpu")]
    with on_gpu():
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            signalled("train.xfactor.get_batch", 2, signal.SIGINT)(command)
        quick_run.command(command)
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("target", [{}, {"share": "0.2"}], ids=str)
def test_the_dispatch_takes_the_compiled_triton_kernels(target, command, tmp_path: Path) -> None:
    """For both targets: their PTX is executed, and the losses are the CPU's but for rounding."""
    pytest.importorskip("triton")
    command = changed(command, steps="1", length="2", **target)
    quick_run.command([*command, "--out", str(tmp_path / "cpu")])
    with second_device() as gpu:
        quick_run.command([*command, "--out", str(tmp_path / "gpu")])
    assert gpu.launches()["triton"] >= 2
    got, expected = (quick_run.losses(tmp_path / name) for name in ("gpu", "cpu"))
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_gpu_samples_the_text_of_a_cpu(small_start: Path, capsys) -> None:
    """Token for token."""
    options = train.sample.Options(model=str(small_start), length=8, top_k=50)
    texts = []
    for where in (nullcontext(), on_gpu()):
        with where:
            train.sample.sample(options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
