"""How a program of the fast kernels walks over its row (drawn in kernels/triton_kl_div.py).

V = 50,257 is odd. For a row at an odd offset, or a mask `column < V`, the compiler falls back on 2-
or 4-byte accesses. Hence the prologue, masks of whole vectors only, and tl.multiple_of to tell the
compiler. Any stride and storage offset take this one path; nothing outside a row is touched.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import bitmask

THREADS = tl.constexpr(bitmask.THREADS)
PER_THREAD = tl.constexpr(bitmask.PER_THREAD)
TILE = tl.constexpr(bitmask.TILE)
LOG2E = tl.constexpr(1.44269502162933349609375)  # rounded to float32
FLOOR = tl.constexpr(-1e38)  # below c z of the largest logit, and -inf - FLOOR is not NaN


@triton.jit
def row_layout(row_ptr, vocab, VEC: tl.constexpr):
    """Elements before the row's first 16-byte boundary, and the number of vectors behind them; then
    the columns of prologue and epilogue, and whether there are such, both (1, THREADS, 1).

    The first VEC threads have the prologue, the following ones what is left after the vectors.
    """
    prologue = tl.minimum(((-row_ptr.to(tl.int64)) & 15).to(tl.int32) // (16 // VEC), vocab)
    vectors = (vocab - prologue) // VEC
    thread = tl.arange(0, THREADS)[None, :, None]
    column = tl.where(thread < VEC, thread, prologue + vectors * VEC + thread - VEC)
    return prologue, vectors, column, tl.where(thread < VEC, thread < prologue, column < vocab)


@triton.jit
def tile_layout(VEC: tl.constexpr):
    """Offset of each element of a tile, and its bit of the bitmask: (rounds, THREADS, VEC).

    The round is added last, as a constant, so that a thread's loads share one address.
    """
    rounds = tl.arange(0, PER_THREAD // VEC)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    element = tl.arange(0, VEC)[None, None, :]
    return thread * VEC + element + rounds * (THREADS * VEC), 1 << (rounds * VEC + element)


@triton.jit
def load(ptr, mask):
    """Load as float32; -inf where the mask, if there is one, is false."""
    return tl.load(ptr, mask, other=None if mask is None else -float("inf")).to(tl.float32)


@triton.jit
def by_thread(x):
    """(rounds, THREADS, VEC) -> (THREADS, rounds * VEC); the last axis lies inside a thread."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (THREADS, x.shape[0] * x.shape[2]))


@triton.jit
def round_lse(row_m, log_l):
    """lse of (5) rounded to float32; and R - M - log2 L of (8), in float64."""
    log_sum = row_m.to(tl.float64) + log_l
    lse = (log_sum / LOG2E).to(tl.float32)
    return lse, (lse * LOG2E).to(tl.float64) - log_sum


@triton.jit
def zero_row(row_ptr, vocab):
    """The gradient of a row that is left out, whatever its logits are, NaN too."""
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        tl.store(row_ptr + column, 0.0, column < vocab)
