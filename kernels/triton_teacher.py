"""KL(softmax(u) || softmax(z)) in two Triton kernels; u are a teacher's logits, tilted or not.

Read kernels/triton_kl_div.py first: notation, work partitioning, alignment and masks are its own.
u is the teacher's row t; with a tilt, plus G nats on the tokens S of the bitmask, in all rows:
added before the maximum and before c, and rounded once, in both directions. With P = softmax(u),

    KL     = sum P (u - z) - lse(u) + lse(z)                                                 (1)
    dKL/dz = softmax(z) - P                                                                  (2)

The forward pass reads t and z once; the backward pass reads them again and writes dz. With the
maxima m of c z and n of c u, a thread keeps l = sum 2^y, r = sum p and d = sum p (x - y):

    y = c z - m',    x = c u - n',    p = 2^x                                                (3)
    l' = l 2^(m - m') + sum 2^y,      r' = r 2^(n - n') + sum p                              (4)
    d' = 2^(n - n') (d + r ((n - n') - (m - m'))) + sum p (x - y)                            (5)

x and y are at most 0, so no number of the size of a logit is summed. (5): when the maxima move,
x - y of what was summed moves by (n - n') - (m - m'), and its weight by 2^(n - n'). At the end,
with M = max m and N = max n, threads are joined in the same way, and

    KL = (d / r + log2 l - log2 r) / c,  lse(z) = (M + log2 l) / c,  lse(u) = (N + log2 r) / c (6)

Where z = u bit for bit, l = r and x = y, so loss and gradient are exactly 0. The gradient repairs
the rounding of lse as (8) of kernels/triton_kl_div.py does: with the R and 2^(R - ...) of z and u,

    dKL/dz = f (2^(c z - R_z) - (f_u / f) 2^(c u - R_u)),    norm = lse(u), f_u / f, f       (7)

Alignment. If t is aligned like z, as contiguous logits of one dtype are, its vectors are read 128
bits at a time. Otherwise it is read element by element.

Hazards, besides those of kernels/triton_kl_div.py.
- t = -inf: p = 0 and x - y = -inf, or NaN if z = -inf too. A select drops both.
- z = -inf where t is finite: KL is +inf. If p underflows, 0 * inf makes d NaN, replaced by +inf.
  A NaN or +inf of z or u still makes the loss NaN, through l or r.
- The maximum is of u, not of t plus G, which would underflow whole rows.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import triton_row
from .triton_row import FLOOR, LOG2E, THREADS, TILE, by_thread, load


@triton.jit
def _open_row(row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, mask_ptr, bits_ptr,
              bits_stride, strength_ptr, TILT: tl.constexpr, T_ALIGN: tl.constexpr,
              VEC: tl.constexpr):  # fmt: skip
    """The program's row: size of its prologue, number of vectors; for _load_tile, where those of z,
    t and the bits begin, and G; then of prologue and epilogue row_layout, z and u."""
    z_ptr = logits_ptr + row * stride
    t_ptr = teacher_ptr + row * teacher_stride
    prologue, _, column, live = triton_row.row_layout(z_ptr, vocab, VEC)
    vectors = tl.maximum(vocab - prologue, 0) // VEC  # not negative: fewer instructions
    z = load(z_ptr + column, live)
    u = load(t_ptr + column, live)
    strength = 0.0
    if TILT:
        strength = tl.load(strength_ptr).to(tl.float32)
        u = tl.where(tl.load(mask_ptr + column, live, other=0) != 0, u + strength, u)
        bits_ptr += prologue * bits_stride
    z_ptr = tl.multiple_of(z_ptr + prologue, 16)
    t_ptr = tl.multiple_of(t_ptr + prologue, T_ALIGN)
    return prologue, vectors, (z_ptr, t_ptr, bits_ptr, strength), column, live, z, u


@triton.jit
def _load_tile(of_row, tile, offsets, bit, mask, TILT: tl.constexpr, T_ALIGN: tl.constexpr):
    """z and u of a tile, -inf where the mask, if there is one, is false.

    The word comes first, which saves registers, but last beside a t that is read by element: AMD's
    compiler keeps the order of the loads, and would wait four times.
    """
    z_ptr, t_ptr, bits_ptr, strength = of_row
    if TILT and T_ALIGN > 4:
        word = tl.load(bits_ptr + tile * THREADS + tl.arange(0, THREADS))
    z = load(z_ptr + tile * TILE + offsets, mask)
    u = load(t_ptr + tile * TILE + offsets, mask)
    if TILT and T_ALIGN <= 4:
        word = tl.load(bits_ptr + tile * THREADS + tl.arange(0, THREADS))
    if TILT:
        u = tl.where((word[None, :, None] & bit) != 0, u + strength, u)
    return z, u


@triton.jit
def _accumulate(state, z, u):
    """(3) to (5) for the logits that a thread reads at a time, (rounds, THREADS, VEC)."""
    m, l, n, r, d = state
    new_m = tl.maximum(m, tl.max(by_thread(z), axis=1) * LOG2E)
    new_n = tl.maximum(n, tl.max(by_thread(u), axis=1) * LOG2E)
    y = tl.fma(z, LOG2E, -new_m[None, :, None])  # (3)
    x = tl.fma(u, LOG2E, -new_n[None, :, None])
    p = tl.exp2(x)
    shift_z, shift_u = m - new_m, n - new_n
    l = l * tl.exp2(shift_z) + tl.sum(by_thread(tl.exp2(y)), axis=1)  # (4)
    keep = tl.exp2(shift_u)
    # Where p = 0, x - y is -inf or NaN: the select drops both, and alters no other term.
    d = keep * (d + r * (shift_u - shift_z))  # (5), and its second half
    x -= y
    d += tl.sum(by_thread(p * tl.where(x > -256.0, x, -256.0)), axis=1)
    r = r * keep + tl.sum(by_thread(p), axis=1)
    return new_m, l, new_n, r, d


@triton.jit(do_not_specialize=list(range(12)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, teacher_ptr, teacher_stride: tl.int64,
    mask_ptr, bits_ptr, bits_stride: tl.int64, strength_ptr, loss_ptr, lse_ptr, norm_ptr,
    TILT: tl.constexpr, T_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Loss, lse, (N,), and norm, (N, 3), all float32, of the row with the program's number.

    logits_ptr, teacher_ptr: (N, V), rows `stride` and `teacher_stride` elements apart, V = vocab.
    TILT: whether there is one; then mask_ptr is that of S, uint8, bits_ptr pack_bits() of it, and
        strength_ptr has G. T_ALIGN: bytes to which the vectors of t are aligned.
    """
    row = tl.program_id(0).to(tl.int64)
    _, vectors, of_row, _, _, z_edge, u_edge = _open_row(
        row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, mask_ptr, bits_ptr,
        bits_stride, strength_ptr, TILT, T_ALIGN, VEC)  # fmt: skip
    zero = tl.zeros((THREADS,), tl.float32)
    state = _accumulate((zero + FLOOR, zero, zero + FLOOR, zero, zero), z_edge, u_edge)

    offsets, bit = triton_row.tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, u = _load_tile(of_row, tile, offsets, bit, None, TILT, T_ALIGN)
        state = _accumulate(state, z, u)
    mask = offsets < (vectors - tiles * (TILE // VEC)) * VEC
    z, u = _load_tile(of_row, tiles, offsets, bit, mask, TILT, T_ALIGN)
    m, l, n, r, d = _accumulate(state, z, u)

    row_m, row_n = tl.max(m, axis=0), tl.max(n, axis=0)
    keep = tl.exp2(n - row_n)
    d = keep * (d + r * ((n - row_n) - (m - row_m)))  # (5), for the threads
    d = tl.sum(tl.where(d == d, d, float("inf")), axis=0)
    r = tl.sum(r * keep, axis=0)
    log_l, log_r = tl.log2(tl.sum(l * tl.exp2(m - row_m), axis=0)), tl.log2(r)
    tl.store(loss_ptr + row, (d / r + (log_l - log_r)) / LOG2E)  # (6), (1)
    lse_z, error_z = triton_row.round_lse(row_m, log_l)
    lse_u, error_u = triton_row.round_lse(row_n, log_r)
    tl.store(lse_ptr + row, lse_z)
    tl.store(norm_ptr + 3 * row, lse_u)  # (7)
    tl.store(norm_ptr + 3 * row + 1, tl.exp2((error_u - error_z).to(tl.float32)))
    tl.store(norm_ptr + 3 * row + 2, tl.exp2(error_z.to(tl.float32)))


@triton.jit
def _gradient(z, u, r_z, r_u, ratio, scale):
    """g times (2); scale: g f."""
    q = tl.exp2(tl.fma(z, LOG2E, -r_z))
    p = tl.exp2(tl.fma(u, LOG2E, -r_u))
    return (q - p * ratio) * scale  # (7)


@triton.jit(do_not_specialize=list(range(15)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, teacher_ptr, teacher_stride: tl.int64,
    mask_ptr, bits_ptr, bits_stride: tl.int64, strength_ptr, lse_ptr, norm_ptr,
    grad_loss_ptr, grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    TILT: tl.constexpr, T_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the row with the program's number: g times (2), to out (N, V).

    Up to strength_ptr, and constants: as in forward_kernel; lse_ptr, norm_ptr: from it. The rest:
    as in the backward kernel of kernels/triton_kl_div.py.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * out_stride
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if grad_loss == 0:
        triton_row.zero_row(out_ptr, vocab)
        return
    prologue, vectors, of_row, column, live, z_edge, u_edge = _open_row(
        row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, mask_ptr, bits_ptr,
        bits_stride, strength_ptr, TILT, T_ALIGN, VEC)  # fmt: skip
    r_z, r_u = tl.load(lse_ptr + row) * LOG2E, tl.load(norm_ptr + 3 * row) * LOG2E
    ratio = tl.load(norm_ptr + 3 * row + 1)
    scale = grad_loss * tl.load(norm_ptr + 3 * row + 2)
    grad_edge = _gradient(z_edge, u_edge, r_z, r_u, ratio, scale)
    tl.store(out_ptr + column, grad_edge, live)

    out_ptr = tl.multiple_of(out_ptr + prologue, 16)
    offsets, bit = triton_row.tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, u = _load_tile(of_row, tile, offsets, bit, None, TILT, T_ALIGN)
        grad = _gradient(z, u, r_z, r_u, ratio, scale)
        tl.store(out_ptr + tile * TILE + offsets, grad)
    mask = offsets < (vectors - tiles * (TILE // VEC)) * VEC
    z, u = _load_tile(of_row, tiles, offsets, bit, mask, TILT, T_ALIGN)
    grad = _gradient(z, u, r_z, r_u, ratio, scale)
    tl.store(out_ptr + tiles * TILE + offsets, grad, mask)
