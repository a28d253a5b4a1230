"""KL(P || softmax(z)) fused into two Triton kernels, forward and backward: the fast ones.

Read kernels/triton_simple.py first. This file computes the same with five changes; per thread and
pass of the main loop on sm_90, float32, forward and backward (python -m kernels.compile_report):

    change                                             counted                 simple      here
    no exchange between threads before the row's end   shuffles and barriers   40, 0       0, 0
    16-byte vectors from the row's first boundary on   width of a load         32 bits     128 bits
    a bit per token, in load order, in place of bytes  loads of the mask       8, 8        1, 1
    16 logits per thread, loaded before any is used    waits for DRAM          3, 1        1, 1
    all of this, and 2^x in place of e^x               instructions per logit  37.6, 19.9  8.3, 6.3

For each row z of N rows of V logits, and a target P with |P| = sum P (1 for a distribution),

    KL(P || softmax(z)) = sum P log P + |P| lse(z) - sum P z,      lse(z) = log sum e^z      (1)
    dKL/dz = |P| softmax(z) - P                                                              (2)

The forward pass reads the logits once and keeps three numbers per row: loss, lse, and norm (8). The
backward pass reads them again, rebuilds softmax(z) from lse, and writes the gradient. No N x V
matrix of log-probabilities, probabilities or targets exists.

Target. Two-level: P = alpha on the target tokens S and beta elsewhere. With r = beta / alpha,

    sum P z = alpha D,    D = sum w z,    w = 1 on S and r elsewhere                         (3)

so P is one bit per token (kernels/bitmask.py), and if beta = 0 only target tokens are added.
Dense: P is a tensor, (V,) for all rows or (N, V); then alpha = 1 and w = P, and D takes in the
other sum over P: D = sum P (z - log P).

Work partitioning. A program of THREADS = 256 threads works on one row. A thread reads 16 bytes at a
time, a vector of `vec` elements: 4 of float32, 8 of bfloat16 or float16. A tile is PER_THREAD = 16
elements of each thread, 4 or 2 vectors.

    address    ..0            16             32                                      end of row
    row          [ z0 z1 z2 | z3 z4 z5 z6  | z7 ..   | z50251 .. z50254 | z50255 z50256 ]
                 prologue     thread 0       thread 1   ...               epilogue

Prologue and epilogue, fewer than `vec` elements each, are read in one step, an element per thread.
Then come whole tiles without a mask, then the masked last one.

Online log-sum-exp. The largest logit must leave the exponent before the exponential, but is known
only at the end of the row. So each thread keeps a maximum m and the sum l of 2^(c z - m), where
c = log2 e: the hardware has 2^x, not e^x, and y = c z - m is one fused multiply-add. For the
elements that a thread reads at a time,

    m' = max(m, max of c z),    y = c z - m',    l' = l 2^(m - m') + sum of 2^y              (4)

That is one exponential per element, and one per tile to rescale. Threads are joined once, at the
row's end, so the main loop has no shuffle and no barrier:

    M = max m,    L = sum over threads of l 2^(m - M),    lse = (M + log2 L) / c             (5)

Numerical precision, loss. GPT-2's logits lie near -80, where neighbouring float32 values are 8e-6
apart. lse and alpha D are as large as that, and the loss is their small difference. So a thread
sums w y in place of w z: y is already computed, and near 0 for logits near the maximum. That sum,
d, must follow m when m moves, which takes the sum u of the weights w:

    d' = d + u (m - m') + sum of w y,    u' = u + sum of w                                   (6)

Dense: w y becomes P (y - log2 P). Two-level: u comes from the number of target tokens of each
thread and tile, which is stored with the bitmask. In (1), M appears in lse and in D and cancels:

    KL = sum P log P + (|P| log2 L - alpha sum over threads of (d + u (m - M))) / c          (7)

d and u (m - M) are logarithms to base 2; 1 / c makes nats of them. Dense: d has sum P log P in it.

Numerical precision, gradient. An absolute error in lse becomes a relative error of softmax, and
rounding lse to float32 costs up to 4e-6. So the forward pass also stores by how much it rounded:

    R = c lse, lse and R rounded to float32,    norm = |P| 2^(R - M - log2 L),
    |P| softmax(z) = norm 2^(c z - R)                                                        (8)

where R - M - log2 L is formed in float64, once per row. c z - R is one fused
multiply-add, spelt tl.fma: a compiler need not fuse what is behind a select.

    symbol     variable            symbol       variable
    m, l, u, d m, l, u, d          c            LOG2E
    M          row_m               r            ratio
    log2 L     log_l               g            grad_loss: upstream gradient of a row's loss
    M + log2 L log_sum             g norm       scale
    |P|        sum_p               -g alpha     pull

Traffic of loss and gradient, in N V elements, for P of shape (V,):

    unfused   log_softmax, P log q, P log P - that: each reads and writes one     6
              sum over the row                                                    1
              backward of the difference writes -g                                1
                       of the product reads -g, writes -g P                       2
                       of log_softmax reads -g P and log q, writes dz             3   in all 13
    fused     forward reads z; backward reads z, writes dz                        3   in all  3

P of shape (N, V) adds 5 (read by three operators; P log P written and read) and 2 (read forward
and backward).

Alignment. V = 50,257 is odd. For a row at an odd offset, or a mask `column < V`, the compiler falls
back on 2- or 4-byte accesses. Hence the prologue, masks of whole vectors only, and tl.multiple_of
to tell the compiler. Any stride and any storage offset take this one path, and nothing outside a
row is touched. For a gradient or a dense P of another alignment, see kernels/triton_launch.py.

Hazards.
- -inf - (-inf) is NaN, in (4) for a tile of -inf: the maximum starts at FLOOR, which is finite.
- 0 * -inf is NaN: a logit where P = 0 is left out by a select, never by a product with 0.
- NaN and +inf reach l (inf - inf), so loss and gradient of their row, and of no other.
- -inf where P > 0 makes d -inf and the loss +inf; its gradient is finite, -P, as in PyTorch.
- Row offsets exceed 2^31 elements from N = 42,731: they are computed in int64.
- softmax - P cancels near convergence: formed in float32 and rounded once, at the store.
- Nothing is specialised on an argument: one compiled variant per dtype and kind of target (for a
  dense P also its dtype and alignment), whatever N, V and strides are.

What this does not do. No float64 logits, and no double backward. Rows are not split over programs:
fewer rows than multiprocessors leave some idle.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: RET505, E741
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import bitmask

THREADS = tl.constexpr(bitmask.THREADS)
PER_THREAD = tl.constexpr(bitmask.PER_THREAD)
TILE = tl.constexpr(bitmask.TILE)
LOG2E = tl.constexpr(1.44269502162933349609375)  # rounded to float32
FLOOR = tl.constexpr(-1e38)  # below every finite c z, and -inf - FLOOR is not NaN
TINY = tl.constexpr(2.0**-126)  # the smallest normal float32


@triton.jit
def prologue_of(row_ptr, vocab, VEC: tl.constexpr):
    """Number of elements before the row's first 16-byte boundary."""
    return tl.minimum(((-row_ptr.to(tl.int64)) & 15).to(tl.int32) // (16 // VEC), vocab)


@triton.jit
def row_layout(prologue, vectors, vocab, VEC: tl.constexpr):
    """Columns of prologue and epilogue, and whether there are such, both (1, THREADS, 1).

    The first VEC threads have the prologue, the following ones what is left after the vectors.
    """
    thread = tl.arange(0, THREADS)[None, :, None]
    column = tl.where(thread < VEC, thread, prologue + vectors * VEC + thread - VEC)
    return column, tl.where(thread < VEC, thread < prologue, column < vocab)


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
def load(ptr, mask, OTHER: tl.constexpr):
    """Load as float32; OTHER where the mask, if there is one, is false."""
    return tl.load(ptr, mask, other=None if mask is None else OTHER).to(tl.float32)


@triton.jit
def by_thread(x):
    """(rounds, THREADS, VEC) -> (THREADS, rounds * VEC); the last axis lies inside a thread."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (THREADS, x.shape[0] * x.shape[2]))


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
def _log2(x, PTX: tl.constexpr):
    """log2 of x, which is not subnormal: tl.log2 is 27 instructions on NVIDIA GPUs, lg2 is one."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def round_lse(row_m, log_l):
    """lse of (5) rounded to float32; and R - M - log2 L of (8), in float64."""
    log_sum = row_m.to(tl.float64) + log_l
    lse = (log_sum / LOG2E).to(tl.float32)
    return lse, (lse * LOG2E).to(tl.float64) - log_sum


@triton.jit
def _open_row(row, logits_ptr, stride, vocab, target_ptr, target_stride, target_step, edge_ptr,
              DENSE: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """The program's row: size of its prologue, number of vectors, where these and their target
    begin; then of prologue and epilogue row_layout, z, and P or which are target tokens."""
    row_ptr = logits_ptr + row * stride
    prologue = prologue_of(row_ptr, vocab, VEC)
    vectors = (vocab - prologue) // VEC
    column, live = row_layout(prologue, vectors, vocab, VEC)
    z = load(row_ptr + column, live, -float("inf"))
    target = tl.load(edge_ptr + row * target_stride + column, live, other=0)
    target_ptr += row * target_stride + prologue * target_step
    target = target.to(tl.float32) if DENSE else target != 0
    if DENSE:
        target_ptr = tl.multiple_of(target_ptr, P_ALIGN)
    z_ptr = tl.multiple_of(row_ptr + prologue, 16)
    return prologue, vectors, z_ptr, target_ptr, column, live, z, target


@triton.jit
def _load_tile(z_ptr, target_ptr, tile, offsets, bit, mask, DENSE: tl.constexpr,
               Z_FIRST: tl.constexpr):  # fmt: skip
    """z; P, or which elements are target tokens; and how many of them each thread has.

    AMD's compiler keeps the order of the loads: with z first, gfx942 waits three times for a P.
    """
    if Z_FIRST:
        z = load(z_ptr + tile * TILE + offsets, mask, -float("inf"))
    if DENSE:
        target, count = load(target_ptr + tile * TILE + offsets, mask, 0.0), 0.0
    else:
        word = tl.load(target_ptr + tile * THREADS + tl.arange(0, THREADS))
        target = (word[None, :, None] & bit) != 0
        count = (word & -65536).to(tl.float32, bitcast=True)
    if not Z_FIRST:
        z = load(z_ptr + tile * TILE + offsets, mask, -float("inf"))
    return z, target, count


@triton.jit
def _accumulate(state, z, target, mask, count, size, ratio,
                DENSE: tl.constexpr, BETA: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """(4) and (6) for the logits z that a thread reads at a time, (rounds, THREADS, VEC).

    target: P, or which elements are target tokens: `count` of a thread's `size` elements. Where
    the mask, if there is one, is false, z is -inf.
    """
    m, l, u, d = state
    new_m = tl.maximum(m, tl.max(by_thread(z), axis=1) * LOG2E)
    y = z * LOG2E - new_m[None, :, None]
    shift = m - new_m
    l = l * tl.exp2(shift) + tl.sum(by_thread(tl.exp2(y)), axis=1)  # (4)
    d += u * shift  # (6), as is the rest
    if DENSE:
        log_ratio = tl.where(tl.abs(target) < TINY, 0.0, y - _log2(target, PTX))
        d += tl.sum(by_thread(target * log_ratio), axis=1)
        u += tl.sum(by_thread(target), axis=1)
    elif BETA:
        if mask is not None:
            y = tl.where(mask, y, 0.0)
        w = tl.where(target, 1.0, ratio)  # (3)
        d += _add_dot(tl.zeros_like(d), by_thread(w), by_thread(y))
        u += size * ratio + count * (1.0 - ratio)
    else:
        d += tl.sum(by_thread(tl.where(target, y, 0.0)), axis=1)  # (3), r = 0
        u += count
    return new_m, l, u, d


@triton.jit(do_not_specialize=list(range(13)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32,
    target_ptr, target_stride: tl.int64, target_step: tl.int64, edge_ptr,
    alpha: tl.float32, ratio: tl.float32, sum_p_log_p: tl.float32,
    loss_ptr, lse_ptr, norm_ptr,
    DENSE: tl.constexpr, BETA: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Loss and lse, float32 (N,), of the row that has the program's number, in nats.

    logits_ptr: (N, V), rows `stride` elements apart, V = vocab.
    target_ptr: the target of the row's vectors starts at element row * target_stride +
        prologue * target_step. DENSE: P, aligned to P_ALIGN bytes there. Else: pack_bits().
    edge_ptr: P or mask (uint8), in rows target_stride apart, for prologue and epilogue.
    alpha, ratio, sum_p_log_p: as in (3) and (1); of a dense P 1, 0 and 0. BETA: beta > 0.
    norm_ptr: |P|, float32 (N,), written if DENSE.
    VEC: elements in 16 bytes of logits. PTX: compiled for an NVIDIA GPU.
    """
    row = tl.program_id(0).to(tl.int64)
    _, vectors, z_ptr, target_ptr, _, live, z_edge, edge = _open_row(
        row, logits_ptr, stride, vocab, target_ptr, target_stride, target_step, edge_ptr,
        DENSE, P_ALIGN, VEC)  # fmt: skip
    edge_count = tl.reshape(edge, (THREADS,)).to(tl.float32)
    size = tl.reshape(live, (THREADS,)).to(tl.float32)
    zero = tl.zeros((THREADS,), tl.float32)
    state = (zero + FLOOR, zero, zero, zero)
    state = _accumulate(state, z_edge, edge, live, edge_count, size, ratio, DENSE, BETA, PTX)

    offsets, bit = tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, target, count = _load_tile(z_ptr, target_ptr, tile, offsets, bit, None, DENSE, PTX)
        state = _accumulate(state, z, target, None, count, PER_THREAD, ratio, DENSE, BETA, PTX)
    rest = vectors - tiles * (TILE // VEC)
    mask = offsets < rest * VEC
    size = ((rest + THREADS - 1 - tl.arange(0, THREADS)) // THREADS * VEC).to(tl.float32)
    z, target, count = _load_tile(z_ptr, target_ptr, tiles, offsets, bit, mask, DENSE, PTX)
    m, l, u, d = _accumulate(state, z, target, mask, count, size, ratio, DENSE, BETA, PTX)

    row_m = tl.max(m, axis=0)
    log_l = tl.log2(tl.sum(l * tl.exp2(m - row_m), axis=0))  # (5)
    d = tl.sum(d + u * (m - row_m), axis=0)  # (7)
    if DENSE:
        sum_p = tl.sum(u, axis=0)
        loss = (sum_p * log_l - d) / LOG2E  # (1), as (7) has it
    else:
        sum_p = 1.0
        loss = sum_p_log_p + (log_l - alpha * d) / LOG2E  # (1), as (7) has it
    lse, rounding = round_lse(row_m, log_l)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(norm_ptr + row, sum_p * tl.exp2(rounding.to(tl.float32)))  # (8)


@triton.jit
def _gradient(z, r, scale, target, pull, ratio, dtype, DENSE: tl.constexpr):
    """g times (2) as dtype, rounded once. scale: g norm; pull: -g alpha, which is -g if DENSE."""
    pull = pull * target if DENSE else tl.where(target, pull, pull * ratio)
    return (tl.exp2(tl.fma(z, LOG2E, -r)) * scale + pull).to(dtype)  # (2), as (8) has it


@triton.jit
def zero_row(row_ptr, vocab):
    """The gradient of a row that is left out, whatever its logits are, NaN too."""
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        tl.store(row_ptr + column, tl.zeros((TILE,), row_ptr.dtype.element_ty), column < vocab)


@triton.jit(do_not_specialize=list(range(15)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32,
    target_ptr, target_stride: tl.int64, target_step: tl.int64, edge_ptr,
    alpha: tl.float32, ratio: tl.float32, lse_ptr, norm_ptr,
    grad_loss_ptr, grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    DENSE: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the row that has the program's number: g times (2), to out (N, V).

    From logits_ptr to ratio, and constants: as in forward_kernel. lse_ptr, norm_ptr: float32 (N,),
    from forward; norm is read if DENSE. grad_loss_ptr: g, (N,), any stride.
    out_ptr: rows `out_stride` apart, of the logits' alignment; or the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    if tl.load(grad_loss_ptr + row * grad_loss_stride) == 0:
        zero_row(out_row_ptr, vocab)
        return
    prologue, vectors, z_ptr, target_ptr, column, live, z_edge, edge = _open_row(
        row, logits_ptr, stride, vocab, target_ptr, target_stride, target_step, edge_ptr,
        DENSE, P_ALIGN, VEC)  # fmt: skip
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    r = tl.load(lse_ptr + row) * LOG2E
    scale, pull = grad_loss * tl.load(norm_ptr + row), -grad_loss * alpha
    dtype = out_ptr.dtype.element_ty
    grad_edge = _gradient(z_edge, r, scale, edge, pull, ratio, dtype, DENSE)
    tl.store(out_row_ptr + column, grad_edge, live)

    out_ptr = tl.multiple_of(out_row_ptr + prologue, 16)
    offsets, bit = tile_layout(VEC)
    tiles = vectors // (TILE // VEC)
    for tile in range(0, tiles):
        z, target, _ = _load_tile(z_ptr, target_ptr, tile, offsets, bit, None, DENSE, True)
        grad = _gradient(z, r, scale, target, pull, ratio, dtype, DENSE)
        tl.store(out_ptr + tile * TILE + offsets, grad)
    mask = offsets < (vectors - tiles * (TILE // VEC)) * VEC
    z, target, _ = _load_tile(z_ptr, target_ptr, tiles, offsets, bit, mask, DENSE, True)
    grad = _gradient(z, r, scale, target, pull, ratio, dtype, DENSE)
    tl.store(out_ptr + tiles * TILE + offsets, grad, mask)
