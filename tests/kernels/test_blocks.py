"""Sizes about each blocking constant: one below a multiple of it, the multiple, one above."""

import re
from pathlib import Path

import pytest
import torch

from kernels import bitmask, fused_linear_kl_div, torch_kl_div
from kernels.fused_linear_kl_div import VOCAB_BLOCK
from tests.kernels.kl_cases import (
    DEVICE,
    DTYPES,
    TARGETS,
    assert_as_exact,
    exact_loss_and_gradients,
    hidden_and_head,
    in_buffer,
    loss_and_gradients,
    make_target,
    random_logits,
    two_level,
    unfused_linear,
)
from tests.kernels.test_kl_div import check


def about(block, *multiples):
    return [k * block + step for k in multiples for step in (-1, 0, 1)]


@pytest.mark.parametrize("kind", TARGETS[:3])
@pytest.mark.parametrize("vocab", about(bitmask.TILE, 1, 2))
def test_vocabularies_about_a_tile_of_the_fast_kernels(vocab, kind):
    """4,096 logits: rows that start on a boundary of 16 bytes and off one, float32 and float16."""
    for dtype, offset in ((torch.float32, 0), (torch.float32, 1), (torch.float16, 0)):
        values = random_logits(2, vocab, dtype=dtype)
        logits, _ = in_buffer(values, (vocab + 7) // 8 * 8, offset)
        check("triton", logits, make_target(kind, logits.shape))


@pytest.mark.parametrize("kind", TARGETS[:2])
@pytest.mark.parametrize("vocab", about(1024, 1, 3))
def test_vocabularies_about_a_block_of_the_simple_kernels(vocab, kind):
    """triton_simple (1) (2) (3) (4): 1,024 logits, and in each block a larger maximum than in the
    last."""
    assert pytest.importorskip("kernels.triton_simple").BLOCK == 1024
    logits = random_logits(2, vocab) + torch.arange(vocab, device=DEVICE) / 100
    check("triton-simple", logits, make_target(kind, logits.shape))


@pytest.mark.parametrize("kind", TARGETS[:3])
def test_rows_and_vocabularies_about_a_tile_of_the_torch_path(monkeypatch, kind):
    """Tiles of two rows, for one to five rows; and a tile of about one row, where a vocabulary that
    is larger gets one row at a time."""
    monkeypatch.setattr(torch_kl_div, "CPU_TILE", 2 * 211)
    monkeypatch.setattr(torch_kl_div, "GPU_TILE", 2 * 211)
    for shape in [(rows, 211) for rows in about(2, 1, 2)] + [(3, vocab) for vocab in about(422, 1)]:
        check("torch", random_logits(*shape), make_target(kind, shape))


@pytest.mark.parametrize("kind", ["rows", "vocabulary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_about_a_chunk_of_rows_and_a_block_of_the_weights_gradient(dtype, kind):
    """Chunks of 4 rows; and dW in blocks of 8,192 rows where it has 16 bits, in the first chunk and
    in the next, which adds: against float64, F.linear and the reference set the bound."""
    sizes = [(rows, 31) for rows in about(4, 1, 2)]
    if kind == "vocabulary":
        sizes = [(3, vocab) for vocab in about(VOCAB_BLOCK, 1, 2)]
    for rows, vocab in sizes:
        hidden, weight = hidden_and_head(rows, vocab=vocab, dtype=dtype)
        chunk = 4 if kind == "rows" else 2
        arguments = hidden, weight, two_level(vocab)
        got = loss_and_gradients(fused_linear_kl_div, *arguments, chunk_rows=chunk)
        same = loss_and_gradients(unfused_linear, *arguments)
        exact = exact_loss_and_gradients(*arguments)
        for results in zip(got, same, exact, strict=True):
            mine, its, true = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in results)
            eps = 2 * torch.finfo(dtype).eps * max(1e-3, true.norm(dim=-1).max().item())
            assert_as_exact(mine, its, true, eps)


def test_a_gradient_is_scaled_whole_whatever_its_size(monkeypatch):
    """The Triton kernel with two programs of 8 elements, so that each goes round several times:
    every element once, none behind the end."""
    launch = pytest.importorskip("kernels.triton_launch")
    monkeypatch.setattr(launch, "SCALE_BLOCK", 8)
    monkeypatch.setattr(launch, "SCALE_PROGRAMS", 2)
    factor = torch.tensor(-2.5, device=DEVICE)
    for size in (0, *about(8, 1, 2, 3, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            buffer = torch.arange(size + 8.0, device=DEVICE).to(dtype)
            expected = torch.cat([buffer[:size] * factor.to(dtype), buffer[size:]])
            launch.scale_(buffer[:size], factor)
            assert torch.equal(buffer, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="huge pages are the CPU path's")
@pytest.mark.parametrize("rows", about(2048, 1))
def test_gradients_about_the_size_of_a_huge_page_are_whole(rows):
    """2,048 rows of 256 float32 are 2 MB: below, ordinary memory; from there on, memory that asks
    for huge pages, as its flag in /proc/self/smaps says."""
    logits = random_logits(rows, 256)
    check("torch", logits, two_level(256))
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no Linux")
    out = torch_kl_div.empty_gradient(logits)
    pattern = r"^(\w+)-(\w+) [^\0]*?^VmFlags:(.*)$"
    for start, end, flags in re.findall(pattern, smaps.read_text(), re.MULTILINE):
        if int(start, 16) <= out.data_ptr() < int(end, 16):
            assert ("hg" in flags.split()) == (rows >= 2048)
            return
    pytest.fail("the gradient lies in no mapping")
