"""Both losses on the second device, where the dispatch takes Triton, against the CPU."""

import json
import math

import pytest
import torch

from kernels import TeacherTarget, TwoLevelTarget, benchmark, fused_kl_div, fused_linear_kl_div

pytest.importorskip("triton")

ROWS, VOCAB, WIDTH = 6, 211, 16


def drawn(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


TWO_LEVEL = TwoLevelTarget(torch.arange(VOCAB) % 3 == 0)  # on the CPU: a loss moves it, once


def teacher(device, tilt=None):
    return TeacherTarget(drawn(ROWS, VOCAB, seed=3, scale=3.0).to(device), tilt)


def from_hidden(device, tilt=None):
    hidden, weight = drawn(ROWS, WIDTH, seed=4), drawn(VOCAB, WIDTH, seed=5, scale=0.5)
    return TeacherTarget.from_hidden(hidden.to(device), weight.to(device), tilt=tilt)


TARGETS = {  # for a device; the last two of the loss with the LM head only
    "two-level": lambda _: TWO_LEVEL,
    "two-level with beta": lambda _: TwoLevelTarget(TWO_LEVEL.mask, 3.0, 0.5),
    "teacher": teacher,
    "tilted teacher": lambda device: teacher(device, (TWO_LEVEL, 2.0)),
    "probabilities": lambda device: drawn(ROWS, VOCAB, seed=6).softmax(-1).to(device),
    "by hidden states": from_hidden,
    "tilted, by hidden states": lambda device: from_hidden(device, (TWO_LEVEL, 2.0)),
}
CASES = [(fused_kl_div, kind) for kind in list(TARGETS)[:-2]]
CASES += [(fused_linear_kl_div, kind) for kind in TARGETS]


def inputs(loss, device, dtype):
    """The tensors that require gradients: logits, or hidden states and a head."""
    if loss is fused_kl_div:
        tensors = [drawn(ROWS, VOCAB, seed=0, scale=3.0)]
    else:
        tensors = [drawn(ROWS, WIDTH, seed=1), drawn(VOCAB, WIDTH, seed=2, scale=0.5)]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])  # of the rows


def distance(x, y):
    """Of two tensors, relative to the second by the norm."""
    assert x.dtype == y.dtype
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_loss_and_gradients_are_those_of_the_cpu_without_a_wait(gpu, loss, kind, impl):
    """To the rounding of float32 sums; Triton is the default. The second call copies nothing."""

    def compute(device):
        tensors, weights = inputs(loss, device, torch.float32), WEIGHTS.to(device)
        target = TARGETS[kind](device)
        loss(*tensors, target, impl=impl).backward()
        gpu.clear()
        value = loss(*tensors, target, impl=impl, row_weights=weights)
        value.backward()
        assert not gpu.waits()
        assert not gpu.copies()
        assert {x.grad.device for x in tensors} == {value.device}
        return [value.detach(), *(x.grad for x in tensors)]

    expected, got = compute("cpu"), compute("cuda")
    assert (gpu.launches()["triton"] >= 2) == (impl is None)  # forward and backward
    for mine, its in zip(got, expected, strict=True):
        assert distance(mine.cpu(), its) < 2e-6


@pytest.mark.parametrize("loss", [fused_kl_div, fused_linear_kl_div])
def test_operands_on_two_devices_are_refused_in_one_line(gpu, loss):
    """By a check of the loss, before an operator of PyTorch's would."""
    tensors = inputs(loss, "cuda", torch.float32)
    for target in (teacher("cpu"), torch.full((ROWS, VOCAB), 1 / VOCAB)):
        with pytest.raises(ValueError, match="cuda:0"):
            loss(*tensors, target)
    with pytest.raises(ValueError, match="row_weights"):
        loss(*tensors, TWO_LEVEL, row_weights=WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_add_up_by_the_products_that_only_cuda_has(gpu, dtype):
    """16-bit products whose sums are float32: three chunks against the CPU's one."""

    def gradients(device, chunk_rows):
        tensors = inputs(fused_linear_kl_div, device, dtype)
        fused_linear_kl_div(*tensors, TWO_LEVEL, chunk_rows=chunk_rows).backward()
        return [x.grad.cpu() for x in tensors]

    for mine, its in zip(gradients("cuda", 2), gradients("cpu", ROWS), strict=True):
        assert distance(mine, its) < (2e-6 if dtype == torch.float32 else 2**-7)


def test_the_benchmark_runs_on_cuda(gpu, monkeypatch, capsys):
    """Each loss of this project but the compiled one, by the device's clock, which stands still."""
    others = "compiled", "Liger", "flash"
    losses = {n: loss for n, loss in benchmark.LOSSES.items() if not any(x in n for x in others)}
    monkeypatch.setattr(benchmark, "LOSSES", losses)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr("kernels.measure.FLUSH_BYTES", 1)  # not 256 MB before each time
    size = ["--rows", "4", "--vocab", str(VOCAB), "--width", str(WIDTH), "--seconds", "0"]
    benchmark.main(["--device", "cuda", "--json", *size])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    for row in table:
        assert row["forward_ms"] == row["fwd_bwd_ms"] == [1.0] * 3, row
        assert all(0 < time < math.inf for time in row["host_ms"])
    assert gpu.launches()["triton"] > 0
