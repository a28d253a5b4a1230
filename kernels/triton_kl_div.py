"""KL(P || softmax(z)) for a two-level P, fused into two Triton kernels: the fast ones.

Read kernels/triton_simple.py first. This file computes the same with five changes; per thread and
pass of the main loop on sm_90, float32, forward and backward (python -m kernels.compile_report):

    change                                             counted                 simple      here
    no exchange between threads before the row's end   shuffles and barriers   40, 0       0, 0
    16-byte vectors from the row's first boundary on   width of a load         32 bits     128 bits
    a bit per token, in load order, instead of a byte  loads of the mask       8, 8        1, 1
    16 logits per thread, loaded before any is used    waits for DRAM          2, 1        1, 1
    all of this, and 2^x instead of e^x                instructions per logit  37.4, 19.6  8.3, 6.1

A row of ten float32 logits, the first of them 4 bytes before a 16-byte boundary:

    address    ..12   16             32             48                      target tokens: 2 and 6
    row        [ z0 | z1 z2 z3 z4  | z5 z6 z7 z8  | z9 ]
               prologue   vector 0     vector 1    epilogue

Vectors are read 16 bytes at a time: thread 0 takes vector 0 and thread 1 vector 1. Prologue and
epilogue, at most three logits each (seven in 16 bits), are read in one step, a logit per thread:
thread 0 takes z0 and thread 4 takes z9. One word of the bitmask tells a thread which of its logits
are target tokens: thread 0 reads 0b0010, because z2 is the second of its vector, and so does thread
1, for z6. Thread 0 sums over z0 to z4, thread 1 over z5 to z8 and thread 4 over z9; then the three
sums are joined.

A program of THREADS = 256 threads works on one row, in tiles of PER_THREAD = 16 elements of each
thread: 4 vectors of float32, 2 of bfloat16 or float16. The last tile is partial, and read with a
mask.

Derivation. For each row z of N rows of V logits, with P = alpha on the target tokens S and beta
elsewhere, in nats,

    KL(P || softmax(z)) = sum P log P + lse(z) - sum P z,      lse(z) = log sum e^z          (1)
    dKL/dz = softmax(z) - P                                                                  (2)

The forward pass reads the logits once and keeps three numbers per row: loss, lse, and norm (8). The
backward pass reads them again and writes the gradient. No N x V matrix of probabilities or targets
exists. With r = beta / alpha,

    sum P z = alpha D,    D = sum w z,    w = 1 on S and r elsewhere                         (3)

so P is one bit per token (kernels/bitmask.py), and if beta = 0 only target tokens are added.

Online log-sum-exp. The largest logit must be subtracted before the exponential, but is known
only at the end of the row. So each thread keeps a maximum m and the sum l of 2^(c z - m), where
c = log2 e: the hardware has 2^x, not e^x, and y = c z - m is one fused multiply-add. For the
elements that a thread reads at a time,

    m' = max(m, max of c z),    y = c z - m',    l' = l 2^(m - m') + sum of 2^y              (4)

That is one exponential per element, and one per tile to rescale. Threads are joined once, at the
row's end, so the main loop has no shuffle and no barrier:

    M = max m,    L = sum over threads of l 2^(m - M),    lse = (M + log2 L) / c             (5)

Numerical precision, loss. GPT-2's logits lie near -80, where neighbouring float32 values are 8e-6
apart. lse and alpha D are as large as that, and the loss is their small difference. So a thread
sums w y instead of w z: y is already computed, and near 0 for logits near the maximum. That sum, d,
must follow m when m moves, which takes the sum u of the weights w:

    d' = d + u (m - m') + sum of w y,    u' = u + sum of w                                   (6)

u comes from the number of target tokens of each thread and tile, which is stored with the bitmask.
In (1), M appears in lse and in D and cancels:

    KL = sum P log P + (log2 L - alpha sum over threads of (d + u (m - M))) / c              (7)

d and u (m - M) are logarithms to base 2; 1 / c makes nats of them.

Numerical precision, gradient. An absolute error in lse becomes a relative error of softmax, and
rounding lse to float32 costs up to 4e-6. So the forward pass also stores by how much it rounded:

    R = c lse, lse and R rounded to float32,    norm = 2^(R - M - log2 L),
    softmax(z) = norm 2^(c z - R)                                                            (8)

where R - M - log2 L is formed in float64, once per row. c z - R is one fused
multiply-add, spelt tl.fma: a compiler need not fuse what is behind a select.

Traffic of loss and gradient, in N V elements, for P of shape (V,):

    unfused   log_softmax, P log q, P log P - P log q: each reads, writes one     6
              sum over the row                                                    1
              backward of the difference writes -g                                1
                       of the product reads -g, writes -g P                       2
                       of log_softmax reads -g P and log q, writes dz             3   in all 13
    fused     forward reads z; backward reads z, writes dz                        3   in all  3

Hazards.
- -inf - (-inf) is NaN, in (4) for a tile of -inf: the maximum starts at FLOOR, which is finite.
- 0 * -inf is NaN: a logit where P = 0 is left out by a select, never by a product with 0.
- NaN and +inf reach l (inf - inf), so loss and gradient of their row, and of no other.
- -inf where P > 0 makes d -inf and the loss +inf; its gradient is finite, -P, as in PyTorch.
- m is c z rounded: a largest logit beyond +-1e9 overflows 2^y. The row's others may be lower.
- Row offsets exceed 2^31 elements from N = 42,732 on: they are computed in int64.
- softmax - P cancels near convergence: formed in float32 and rounded once, at the store.
- Nothing is specialised on an argument: one compiled variant per dtype and kind of target,
  whatever N, V and strides are.
- Rows are not split over programs: fewer rows than multiprocessors leave some idle.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: RET505, E741
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import triton_row
from .triton_row import FLOOR, LOG2E, PER_THREAD, THREADS, TILE, by_thread, load


@triton.jit
def _add_dot(total, x, y):
    """total + the sum of x y over the last axis of (THREADS, n), one fused multiply-add each.

    tl.sum(x * y) is a tree from Triton 3.8 on: of each two products, one is not fused.
    """
    if x.shape[1] == 1:
        return tl.fma(tl.reshape(x, (THREADS,)), tl.reshape(y, (THREADS,)), total)
    else:
        x0, x1 = tl.split(tl.reshape(x, (THREADS, x.shape[1] // 2, 2)))
        y0, y1 = tl.split(tl.reshape(y, (THREADS, y.shape[1] // 2, 2)))
        return _add_dot(_add_dot(total, x0, y0), x1, y1)


@triton.jit
def _open_row(row, logits_ptr, stride, vocab, mask_ptr, bits_ptr, bits_stride, VEC: tl.constexpr):
    """The program's row: size of its prologue, number of vectors, where these and their bits begin;
    then of prologue and epilogue row_layout, z, and which are target tokens."""
    row_ptr = logits_ptr + row * stride
    prologue, vectors, column, live = triton_row.row_layout(row_ptr, vocab, VEC)
    z = load(row_ptr + column, live)
    target = tl.load(mask_ptr + column, live, other=0) != 0
    z_ptr = tl.multiple_of(row_ptr + prologue, 16)
    return prologue, vectors, z_ptr, bits_ptr + prologue * bits_stride, column, live, z, target


@triton.jit
def _load_tile(z_ptr, bits_ptr, tile, offsets, bit, mask):
    """z; which elements are target tokens; and how many of them each thread has."""
    z = load(z_ptr + tile * TILE + offsets, mask)
    word = tl.load(bits_ptr + tile * THREADS + tl.arange(0, THREADS))
    target = (word[None, :, None] & bit) != 0
    return z, target, (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _accumulate(state, z, target, mask, count, size, ratio, BETA: tl.constexpr):
    """(4) and (6) for the logits z that a thread reads at a time, (rounds, THREADS, VEC).

    target: which elements are target tokens, `count` of a thread's `size` elements. Where the mask,
    if there is one, is false, z is -inf.
    """
    m, l, u, d = state
    new_m = tl.maximum(m, tl.max(by_thread(z), axis=1) * LOG2E)
    y = z * LOG2E - new_m[None, :, None]
    shift = m - new_m
    l = l * tl.exp2(shift) + tl.sum(by_thread(tl.exp2(y)), axis=1)  # (4)
    d += u * shift  # (6), as is the rest
    if BETA:
        if mask is not None:
            y = tl.where(mask, y, 0.0)
        w = tl.where(target, 1.0, ratio)  # (3)
        d += _add_dot(tl.zeros_like(d), by_thread(w), by_thread(y))
        u += size * ratio + count * (1.0 - ratio)
    else:
        d += tl.sum(by_thread(tl.where(target, y, 0.0)), axis=1)  # (3), r = 0
        u += count
    return new_m, l, u, d


@triton.jit(do_not_specialize=list(range(10)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, mask_ptr, bits_ptr, bits_stride: tl.int64,
    levels_ptr, loss_ptr, lse_ptr, norm_ptr, BETA: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Loss, lse and norm (8), float32 (N,), of the row with the program's number, in nats.

    logits_ptr: (N, V), rows `stride` elements apart, V = vocab.
    mask_ptr: uint8 (V,), for prologue and epilogue. bits_ptr: pack_bits(), a table per prologue.
    levels_ptr: alpha, beta, r, log alpha, log beta, sum P log P. BETA: beta > 0.
    VEC: elements in 16 bytes of logits.
    """
    row = tl.program_id(0).to(tl.int64)
    _, vectors, z_ptr, bits_ptr, _, live, z_edge, edge = _open_row(
        row, logits_ptr, stride, vocab, mask_ptr, bits_ptr, bits_stride, VEC)  # fmt: skip
    ratio = tl.load(levels_ptr + 2).to(tl.float32) if BETA else 0.0
    edge_count = tl.reshape(edge, (THREADS,)).to(tl.float32)
    size = tl.reshape(live, (THREADS,)).to(tl.float32)
    zero = tl.zeros((THREADS,), tl.float32)
    state = (zero + FLOOR, zero, zero, zero)
    state = _accumulate(state, z_edge, edge, live, edge_count, size, ratio, BETA)

    offsets, bit = triton_row.tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, target, count = _load_tile(z_ptr, bits_ptr, tile, offsets, bit, None)
        state = _accumulate(state, z, target, None, count, PER_THREAD, ratio, BETA)
    rest = vectors - tiles * (TILE // VEC)
    mask = offsets < rest * VEC
    size = ((rest + THREADS - 1 - tl.arange(0, THREADS)) // THREADS * VEC).to(tl.float32)
    z, target, count = _load_tile(z_ptr, bits_ptr, tiles, offsets, bit, mask)
    m, l, u, d = _accumulate(state, z, target, mask, count, size, ratio, BETA)

    row_m = tl.max(m, axis=0)
    log_l = tl.log2(tl.sum(l * tl.exp2(m - row_m), axis=0))  # (5)
    d = tl.sum(d + u * (m - row_m), axis=0)  # (7)
    alpha, sum_p_log_p = tl.load(levels_ptr).to(tl.float32), tl.load(levels_ptr + 5).to(tl.float32)
    lse, rounding = triton_row.round_lse(row_m, log_l)
    tl.store(loss_ptr + row, sum_p_log_p + (log_l - alpha * d) / LOG2E)  # (1), as (7) has it
    tl.store(lse_ptr + row, lse)
    tl.store(norm_ptr + row, tl.exp2(rounding.to(tl.float32)))  # (8)


@triton.jit
def _gradient(z, r, scale, target, pull, other_pull):
    """g times (2). scale: g norm; pulls: -g alpha and -g beta."""
    pull = tl.where(target, pull, other_pull)  # before 2^x: ptxas then tests seven bits at once
    return tl.exp2(tl.fma(z, LOG2E, -r)) * scale + pull


@triton.jit(do_not_specialize=list(range(13)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, mask_ptr, bits_ptr, bits_stride: tl.int64,
    levels_ptr, lse_ptr, norm_ptr, grad_loss_ptr, grad_loss_stride: tl.int64,
    out_ptr, out_stride: tl.int64, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the row with the program's number: g times (2), to out (N, V).

    From logits_ptr to levels_ptr: as in forward_kernel; lse_ptr, norm_ptr: from it.
    grad_loss_ptr: g, (N,), any stride. out_ptr: rows `out_stride` apart, of the logits' alignment;
    or the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if grad_loss == 0:
        triton_row.zero_row(out_row_ptr, vocab)
        return
    prologue, vectors, z_ptr, bits_ptr, column, live, z_edge, edge = _open_row(
        row, logits_ptr, stride, vocab, mask_ptr, bits_ptr, bits_stride, VEC)  # fmt: skip
    r = tl.load(lse_ptr + row) * LOG2E
    scale = grad_loss * tl.load(norm_ptr + row)
    pull = -grad_loss * tl.load(levels_ptr).to(tl.float32)
    other_pull = pull * tl.load(levels_ptr + 2).to(tl.float32)
    grad_edge = _gradient(z_edge, r, scale, edge, pull, other_pull)
    tl.store(out_row_ptr + column, grad_edge, live)

    out_ptr = tl.multiple_of(out_row_ptr + prologue, 16)
    offsets, bit = triton_row.tile_layout(VEC)
    tiles = tl.maximum(vectors, 0) // (TILE // VEC)  # it is not negative: fewer instructions
    for tile in range(0, tiles):
        z, target, _ = _load_tile(z_ptr, bits_ptr, tile, offsets, bit, None)
        grad = _gradient(z, r, scale, target, pull, other_pull)
        tl.store(out_ptr + tile * TILE + offsets, grad)
    mask = offsets < (vectors - tiles * (TILE // VEC)) * VEC
    z, target, _ = _load_tile(z_ptr, bits_ptr, tiles, offsets, bit, mask)
    grad = _gradient(z, r, scale, target, pull, other_pull)
    tl.store(out_ptr + tiles * TILE + offsets, grad, mask)
