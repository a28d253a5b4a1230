"""Both losses on the second device, where the dispatch takes Triton, against the CPU."""

import pytest
import torch

from kernels import TeacherTarget, TwoLevelTarget, fused_linear_kl_div
from tests.kernels.kl_cases import LOSSES, hidden_and_head, make_target, random_logits

pytest.importorskip("triton")

ROWS, VOCAB = 6, 211
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])  # of the rows
TWO_LEVEL = TwoLevelTarget(torch.arange(VOCAB) % 3 == 0)  # on the CPU: a loss moves it, once


def dense(device, tilt=None):
    return TeacherTarget(random_logits(ROWS, VOCAB, seed=3).to(device), tilt)


def from_hidden(device, tilt=None):
    hidden, weight = inputs(device)
    return TeacherTarget.from_hidden(hidden.flip(0), weight, tilt)


TARGETS = {  # for a device; the last two of the loss with the LM head only
    "two-level": lambda _: TWO_LEVEL,
    "two-level with beta": lambda _: TwoLevelTarget(TWO_LEVEL.mask, 3.0, 0.5),
    "teacher": dense,
    "tilted teacher": lambda device: dense(device, (TWO_LEVEL, 2.0)),
    "probabilities": lambda device: make_target("row by row", (ROWS, VOCAB)).to(device),
    "by hidden states": from_hidden,
    "tilted, by hidden states": lambda device: from_hidden(device, (TWO_LEVEL, 2.0)),
}
CASES = [("fused_kl_div", kind) for kind in list(TARGETS)[:-2]]
CASES += [("fused_linear_kl_div", kind) for kind in TARGETS]


def inputs(device, dtype=torch.float32):
    """Hidden states and a head, which require gradients."""
    return [x.detach().to(device, dtype).requires_grad_() for x in hidden_and_head(ROWS)]


def distance(x, y):
    """Of two tensors, relative to the second by the norm."""
    assert x.dtype == y.dtype
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_loss_and_gradients_are_those_of_the_cpu_without_a_wait(gpu, name, kind, impl):
    """To the rounding of float32 sums; Triton is the default. The second call copies nothing."""

    def compute(device):
        tensors, weights = inputs(device), WEIGHTS.to(device)
        target = TARGETS[kind](device)
        LOSSES[name](*tensors, target, impl=impl).backward()
        gpu.clear()
        value = LOSSES[name](*tensors, target, impl=impl, row_weights=weights)
        value.backward()
        assert not gpu.waits()
        assert not gpu.copies()
        assert {x.grad.device for x in tensors} == {value.device}
        return [value.detach(), *(x.grad for x in tensors)]

    expected, got = compute("cpu"), compute("cuda")
    assert (gpu.launches()["triton"] >= 2) == (impl is None)  # forward and backward
    for mine, its in zip(got, expected, strict=True):
        assert distance(mine.cpu(), its) < 2e-6


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_operands_on_two_devices_are_refused_in_one_line(gpu, loss):
    """By a check of the loss, before an operator of PyTorch's would."""
    tensors = inputs("cuda")
    for target in (dense("cpu"), torch.full((ROWS, VOCAB), 1 / VOCAB)):
        with pytest.raises(ValueError, match="cuda:0"):
            loss(*tensors, target)
    with pytest.raises(ValueError, match="row_weights"):
        loss(*tensors, TWO_LEVEL, row_weights=WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_add_up_by_the_products_that_only_cuda_has(gpu, dtype):
    """16-bit products whose sums are float32: three chunks against the CPU's one."""

    def gradients(device, chunk_rows):
        tensors = inputs(device, dtype)
        fused_linear_kl_div(*tensors, TWO_LEVEL, chunk_rows=chunk_rows).backward()
        return [x.grad.cpu() for x in tensors]

    for mine, its in zip(gradients("cuda", 2), gradients("cpu", ROWS), strict=True):
        assert distance(mine, its) < (2e-6 if dtype == torch.float32 else 2**-7)
