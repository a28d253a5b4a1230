"""KL(softmax(t + b) || softmax(z)) fused into two Triton kernels, t the logits of a teacher.

Read kernels/triton_kl_div.py first: notation, work partitioning, alignment and masks are its own.
t is the teacher's row, b a bias per token, shared by all rows. With u = t + b and P = softmax(u),

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

Bias. None; b = strength on a mask and 0 elsewhere: one bit per token (kernels/bitmask.py); or any
vector, read from shifted copies of it. b is added before the maximum and before c, rounded once, in
both directions. b = -inf forbids a token.

Alignment. If t has the alignment of z (contiguous logits of one dtype have), one 128-bit load does.
Else t lies k elements past its own 16-byte blocks wherever z is aligned, k the same for the whole
row: a thread loads the two blocks that hold its vector, the second a hit in L1, and shifts them
left by k elements in registers. Blocks hold at least one element of the row, so up to 12 bytes
before it are read, never past its end. Element by element: a t of another alignment with a bias
vector (out of registers), or whose elements have another size than those of z.

Hazards, besides those of kernels/triton_kl_div.py.
- t = -inf: p = 0 and x - y = -inf, or NaN if z = -inf too. A select drops both.
- z = -inf where t is finite: KL is +inf. If p underflows, 0 * inf makes d NaN: +inf in its place.
  A NaN or +inf of z or u still makes the loss NaN, through l or r.
- The maximum is of u, not of t plus the largest b, which would underflow whole rows.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .triton_kl_div import (
    FLOOR,
    LOG2E,
    PER_THREAD,
    THREADS,
    TILE,
    by_thread,
    load,
    prologue_of,
    round_lse,
    row_layout,
    tile_layout,
    zero_row,
)


@triton.jit
def _open_row(row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, bias_ptr, bias_step,
              edge_ptr, strength, BIAS: tl.constexpr, SHIFT: tl.constexpr, T_ALIGN: tl.constexpr,
              VEC: tl.constexpr):  # fmt: skip
    """The program's row: size of its prologue, number of vectors, and for _load_tile where those of
    z, t and b begin, strength, and k: how many elements before its first vector t's 16-byte block
    begins. Then of prologue and epilogue row_layout, z and u.

    A vector of t lies in two blocks if k > 0, of which the second must end within the row.
    """
    z_ptr = logits_ptr + row * stride
    t_ptr = teacher_ptr + row * teacher_stride
    prologue = prologue_of(z_ptr, vocab, VEC)
    k = prologue * 0
    if SHIFT:
        k = ((t_ptr + prologue).to(tl.int64) & 15).to(tl.int32) // (16 // VEC)
    room = vocab - prologue - tl.where(k > 0, VEC - k, 0)
    vectors = tl.maximum(room, 0) // VEC
    column, live = row_layout(prologue, vectors, vocab, VEC)
    z = load(z_ptr + column, live, -float("inf"))
    u = load(t_ptr + column, live, -float("inf"))
    bias_ptr += prologue * bias_step
    if BIAS == "bits":
        u = tl.where(tl.load(edge_ptr + column, live, other=0) != 0, u + strength, u)
    elif BIAS == "vector":
        u += load(edge_ptr + column, live, 0.0)
        bias_ptr = tl.multiple_of(bias_ptr, 16)
    z_ptr = tl.multiple_of(z_ptr + prologue, 16)
    t_ptr = tl.multiple_of(t_ptr + prologue, T_ALIGN)
    return prologue, vectors, (z_ptr, t_ptr, bias_ptr, strength, k), column, live, z, u


@triton.jit
def _funnel(low, high, bits):
    """The 32 bits of high:low from bit `bits` on, 0 or 16."""
    wide = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return (wide >> bits.to(tl.int64)).to(tl.int32)


@triton.jit
def _words(x):
    """(rounds, THREADS, 4) -> its four words."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], THREADS, 2, 2)))  # words 0 2, words 1 3
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _shifted(t_ptr, k, rest, VEC: tl.constexpr):
    """t at z's vectors, which start k elements into t's 16-byte blocks: two blocks, one shift.

    Blocks of the first `rest` vectors alone are read, if that is not None. k is the same for the
    whole row, so each select is one instruction, and no thread needs another's data.
    """
    ROUNDS: tl.constexpr = PER_THREAD // VEC
    HALVES: tl.constexpr = VEC // 4  # elements in a 32-bit word
    dtype = t_ptr.dtype.element_ty
    first = tl.multiple_of((t_ptr - k).to(tl.pointer_type(tl.int32)), 16)
    second = tl.multiple_of(first + tl.where(k > 0, 4, 0), 16)
    vector = tl.arange(0, ROUNDS)[:, None, None] * THREADS + tl.arange(0, THREADS)[None, :, None]
    at = vector * 4 + tl.arange(0, 4)[None, None, :]
    mask = None if rest is None else at < rest * 4
    other = None if rest is None else 0
    a, b = tl.load(first + at, mask, other), tl.load(second + at, mask, other)
    a0, a1, a2, a3 = _words(a)
    b0, b1, b2, b3 = _words(b)
    two = ((k // HALVES) & 2) != 0
    one = ((k // HALVES) & 1) != 0
    x0, x1, x2 = tl.where(two, a2, a0), tl.where(two, a3, a1), tl.where(two, b0, a2)
    x3, x4, x5 = tl.where(two, b1, a3), tl.where(two, b2, b0), tl.where(two, b3, b1)
    w0, w1, w2 = tl.where(one, x1, x0), tl.where(one, x2, x1), tl.where(one, x3, x2)
    w3, w4 = tl.where(one, x4, x3), tl.where(one, x5, x4)
    if HALVES == 2:
        bits = (k & 1) * 16
        w0, w1 = _funnel(w0, w1, bits), _funnel(w1, w2, bits)
        w2, w3 = _funnel(w2, w3, bits), _funnel(w3, w4, bits)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROUNDS, THREADS, 4))
    if HALVES == 2:
        w = tl.join(w.to(tl.int16), (w >> 16).to(tl.int16))
        w = tl.reshape(w, (ROUNDS, THREADS, 8))
    return w.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(of_row, tile, offsets, bit, rest, BIAS: tl.constexpr, SHIFT: tl.constexpr,
               VEC: tl.constexpr):  # fmt: skip
    """z and u = t + b of a tile, -inf beyond the first `rest` vectors, if that is not None."""
    z_ptr, t_ptr, bias_ptr, strength, k = of_row
    mask = None if rest is None else offsets < rest * VEC
    z = load(z_ptr + tile * TILE + offsets, mask, -float("inf"))
    t_ptr += tile * TILE
    if BIAS == "vector":  # before t: behind it, gfx942 waits three times, with Triton 3.8
        b = load(bias_ptr + tile * TILE + offsets, mask, 0.0)
    if SHIFT:
        u = _shifted(t_ptr, k, rest, VEC)
        if mask is not None:
            u = tl.where(mask, u, -float("inf"))
    else:
        u = load(t_ptr + offsets, mask, -float("inf"))
    if BIAS == "bits":
        word = tl.load(bias_ptr + tile * THREADS + tl.arange(0, THREADS))
        biased = (word[None, :, None] & bit) != 0
        if SHIFT:  # which leaves few predicates: this form holds none for long
            u += tl.where(biased, strength, 0.0)
        else:
            u = tl.where(biased, u + strength, u)
    elif BIAS == "vector":
        u += b
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
    bias_ptr, bias_step: tl.int64, edge_ptr, strength: tl.float32, loss_ptr, lse_ptr, norm_ptr,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, T_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Loss, lse, (N,), and norm, (N, 3), all float32, of the row that has the program's number.

    logits_ptr, teacher_ptr: (N, V), rows `stride` and `teacher_stride` elements apart, V = vocab.
    BIAS: "none"; "bits": bias_ptr is pack_bits(mask) and edge_ptr the mask, uint8; "vector":
        bias_ptr is shifted_copies(b), float32, and edge_ptr its first row. The bias of the row's
        vectors starts at element prologue * bias_step.
    SHIFT: t has another alignment than z. T_ALIGN: bytes to which its vectors are aligned, if not.
    """
    row = tl.program_id(0).to(tl.int64)
    _, vectors, of_row, _, _, z_edge, u_edge = _open_row(
        row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, bias_ptr, bias_step,
        edge_ptr, strength, BIAS, SHIFT, T_ALIGN, VEC)  # fmt: skip
    zero = tl.zeros((THREADS,), tl.float32)
    state = _accumulate((zero + FLOOR, zero, zero + FLOOR, zero, zero), z_edge, u_edge)

    offsets, bit = tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, u = _load_tile(of_row, tile, offsets, bit, None, BIAS, SHIFT, VEC)
        state = _accumulate(state, z, u)
    rest = vectors - tiles * (TILE // VEC)
    z, u = _load_tile(of_row, tiles, offsets, bit, rest, BIAS, SHIFT, VEC)
    m, l, n, r, d = _accumulate(state, z, u)

    row_m, row_n = tl.max(m, axis=0), tl.max(n, axis=0)
    keep = tl.exp2(n - row_n)
    d = keep * (d + r * ((n - row_n) - (m - row_m)))  # (5), for the threads
    d = tl.sum(tl.where(d == d, d, float("inf")), axis=0)
    r = tl.sum(r * keep, axis=0)
    log_l, log_r = tl.log2(tl.sum(l * tl.exp2(m - row_m), axis=0)), tl.log2(r)
    tl.store(loss_ptr + row, (d / r + (log_l - log_r)) / LOG2E)  # (6), (1)
    lse_z, error_z = round_lse(row_m, log_l)
    lse_u, error_u = round_lse(row_n, log_r)
    tl.store(lse_ptr + row, lse_z)
    tl.store(norm_ptr + 3 * row, lse_u)  # (7)
    tl.store(norm_ptr + 3 * row + 1, tl.exp2((error_u - error_z).to(tl.float32)))
    tl.store(norm_ptr + 3 * row + 2, tl.exp2(error_z.to(tl.float32)))


@triton.jit
def _gradient(z, u, r_z, r_u, ratio, scale, dtype):
    """g times (2) as dtype, rounded once; scale: g f."""
    q = tl.exp2(tl.fma(z, LOG2E, -r_z))
    p = tl.exp2(tl.fma(u, LOG2E, -r_u))
    return ((q - p * ratio) * scale).to(dtype)  # (7)


@triton.jit(do_not_specialize=list(range(15)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, teacher_ptr, teacher_stride: tl.int64,
    bias_ptr, bias_step: tl.int64, edge_ptr, strength: tl.float32, lse_ptr, norm_ptr,
    grad_loss_ptr, grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, T_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the row that has the program's number: g times (2), to out (N, V).

    Up to strength, and constants: as in forward_kernel; lse_ptr, norm_ptr: from it. The rest: as
    in the backward kernel of kernels/triton_kl_div.py.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * out_stride
    if tl.load(grad_loss_ptr + row * grad_loss_stride) == 0:
        zero_row(out_ptr, vocab)
        return
    prologue, vectors, of_row, column, live, z_edge, u_edge = _open_row(
        row, logits_ptr, stride, vocab, teacher_ptr, teacher_stride, bias_ptr, bias_step,
        edge_ptr, strength, BIAS, SHIFT, T_ALIGN, VEC)  # fmt: skip
    r_z, r_u = tl.load(lse_ptr + row) * LOG2E, tl.load(norm_ptr + 3 * row) * LOG2E
    ratio = tl.load(norm_ptr + 3 * row + 1)
    scale = tl.load(grad_loss_ptr + row * grad_loss_stride) * tl.load(norm_ptr + 3 * row + 2)
    dtype = out_ptr.dtype.element_ty
    grad_edge = _gradient(z_edge, u_edge, r_z, r_u, ratio, scale, dtype)
    tl.store(out_ptr + column, grad_edge, live)

    out_ptr = tl.multiple_of(out_ptr + prologue, 16)
    offsets, bit = tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, u = _load_tile(of_row, tile, offsets, bit, None, BIAS, SHIFT, VEC)
        grad = _gradient(z, u, r_z, r_u, ratio, scale, dtype)
        tl.store(out_ptr + tile * TILE + offsets, grad)
    rest = vectors - tiles * (TILE // VEC)
    z, u = _load_tile(of_row, tiles, offsets, bit, rest, BIAS, SHIFT, VEC)
    grad = _gradient(z, u, r_z, r_u, ratio, scale, dtype)
    tl.store(out_ptr + tiles * TILE + offsets, grad, offsets < rest * VEC)
