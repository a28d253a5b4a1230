"""Log-softmax and KL divergence fused into two Triton kernels, forward and backward.

What. For each row z of N rows of V logits, and a target P with W = sum P (1 for a distribution),

    KL(P || softmax(z)) = sum P log P + W lse(z) - sum P z,      lse(z) = log sum e^z        (1)
    dKL/dz = W softmax(z) - P                                                                (2)

Forward reads the logits once and keeps two numbers a row, the loss and lse. Backward reads them
once more, rebuilds softmax(z) = e^(z - lse), and writes the gradient. No N x V matrix of
log-probabilities, probabilities or targets exists.

The target. Two-level: P = alpha on the members S and beta elsewhere. With r = beta / alpha,

    sum P z = alpha D,    D = sum w z,    w = 1 on S and r elsewhere                         (3)

so that P is one bit an element (kernels/membership.py), and if beta = 0 only members are added.
Dense: P is a tensor, (V,) for all rows or (N, V); then alpha = 1, w = P, D = sum P (z - log P).

Online log-sum-exp. The largest logit must leave the exponent before the exponential, but is known
only at the end of the row. So each lane keeps a maximum m and the sum t of 2^(c z - m), where
c = log2 e: the hardware has 2^x and no e^x, and y = c z - m is one fused multiply-add. For a tile

    m' = max(m, max of c z),    y = c z - m',    t' = t 2^(m - m') + sum of 2^y              (4)

One exponential an element, one a tile to rescale. Lanes are joined once, at the row's end:

    M = max m,    t = sum over lanes of t 2^(m - M),    lse = (M + log2 t) / c               (5)

Last digits. GPT-2's logits lie near -80, where a float32 has 8e-6 between neighbours, and D and lse
are far larger than their difference. So D is not summed over z but over the small y, which cost
nothing more, and moved when m moves. With d such a sum and u the sum of its weights w, per lane,

    d' = d + u (m - m') + sum of w y,    u' = u + sum of w                                   (6)
    KL = sum P log P + (W log2 t - alpha sum over lanes of (d + u (m - M))) / c              (7)

u is not added up element by element: the table has the number of members of each lane and tile.

Traffic, in N V elements read or written, for P of shape (V,):

    unfused  log_softmax        2     its backward (gradient, result; result)   3
             P * log_q          2     backward: -g, times P                     1 + 2
             P log P - ...      2
             sum over the row   1     in all 13; 18 if P is (N, V)
    fused    forward            1     backward 2; in all 3

Who owns what. One program of LANES threads a row. A row is [head | vectors | tail]:

    address    ..0            16             32                                      end of row
    row          [ z0 z1 z2 | z3 z4 z5 z6  | z7 ..   | z50251 .. z50254 | z50255 z50256 ]
                   head       lane 0         lane 1    ...                tail
    head, tail   fewer than `vec` elements each; one scalar access a lane for both together
    vectors      16 bytes a lane and round: whole tiles of SLOTS elements a lane, no mask, then
                 single rounds, masked by the vector

A lane's maximum and sums stay in its registers: no shuffle and no barrier inside the loops.

Alignment. V = 50,257 is odd. A row at an odd offset, or a mask `column < V`, makes the compiler
fall back on 2- or 4-byte accesses. Hence: start at the row's first 16-byte boundary, mask whole
vectors only, tell the compiler (tl.multiple_of), and leave the ends to scalars. Padding rows to a
stride of 50,304 makes every head empty, but is not needed: contiguous logits, any stride and any
storage offset take the same path. Nothing outside a row is read or written.

Hazards.
- -inf - (-inf) is NaN, in (4) for a tile of -inf: the maximum starts at FLOOR, which is finite.
- 0 * -inf is NaN: a logit where P = 0 is left out by a select, never by a product with 0.
- NaN and +inf reach t (inf - inf), so loss and gradient of their row, and of no other.
- -inf where P > 0 makes d -inf and the loss +inf; its gradient is finite, -P, as in PyTorch.
- Offsets of rows exceed 2^31 elements at N = 42,731: they are computed in int64.
- softmax - P cancels near convergence: formed in float32 and rounded once, at the store.
- Specialised on nothing: one compiled variant a dtype and kind of target, whatever N, V, strides.

What this does not do. No float64 and no double backward. The gradient's relative error is that of
lse in float32, 6e-8 |lse|. A dense P out of step with the logits' boundaries is read by scalars.
Rows are not split over programs: fewer rows than multiprocessors leave some idle.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: RET505, SIM108
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels import membership

LANES = tl.constexpr(membership.LANES)
SLOTS = tl.constexpr(membership.SLOTS)
LOG2E = tl.constexpr(1.44269502162933349609375)  # rounded to float32
FLOOR = tl.constexpr(-1e38)


@triton.jit
def _row(row_ptr, vocab, VEC: tl.constexpr):
    """head, the number of vectors, and each lane's column in head or tail: (1, LANES, 1)."""
    to_boundary = ((-row_ptr.to(tl.int64)) & 15).to(tl.int32)
    head = tl.minimum(to_boundary // (16 // VEC), vocab)
    vectors = (vocab - head) // VEC
    lane = tl.arange(0, LANES)[None, :, None]
    column = tl.where(lane < VEC, lane, head + vectors * VEC + lane - VEC)
    return head, vectors, column, tl.where(lane < VEC, lane < head, column < vocab)


@triton.jit
def _slots(ROUNDS: tl.constexpr, VEC: tl.constexpr):
    """Of each slot of a tile (ROUNDS, LANES, VEC): its offset, and its bit in its lane's word."""
    rounds = tl.arange(0, ROUNDS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    element = tl.arange(0, VEC)[None, None, :]
    return (rounds * LANES + lane) * VEC + element, 1 << (rounds * VEC + element)


@triton.jit
def _load(ptr, mask, OTHER: tl.constexpr):
    if mask is None:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask, other=OTHER).to(tl.float32)


@triton.jit
def _count(word, BITS: tl.constexpr):
    count = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(BITS):
        count += tl.where((word & (1 << i)) != 0, 1.0, 0.0)
    return count


@triton.jit
def _target(ptr, stride, members_ptr, row, head, column, live, vocab,
            DENSE: tl.constexpr, P_ALIGN: tl.constexpr):  # fmt: skip
    """Where the target of the row's vectors starts (a lane's, of words), and that of its ends."""
    if DENSE:
        ptr += row * stride
        return tl.multiple_of(ptr + head, P_ALIGN), _load(ptr + column, live, 0.0)
    else:
        ends = tl.load(members_ptr + column, live, other=0) != 0
        table = head * (vocab // (LANES * SLOTS) + 1) * (2 * LANES)
        return ptr + table + tl.arange(0, LANES), ends


@triton.jit
def _by_lane(x):
    """(rounds, LANES, VEC) -> (LANES, rounds * VEC); the last axis lies inside a thread."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (LANES, x.shape[0] * x.shape[2]))


@triton.jit
def _accumulate(state, z, target, mask, members, slots, ratio,
                DENSE: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """(4) and (6) for one tile, in which a lane has `members` among `slots` elements."""
    top, total, weight, dot = state
    new_top = tl.maximum(top, tl.max(_by_lane(z), axis=1) * LOG2E)
    y = z * LOG2E - new_top[None, :, None]
    shift = top - new_top
    total = total * tl.exp2(shift) + tl.sum(_by_lane(tl.exp2(y)), axis=1)  # (4)
    dot += weight * shift  # (6)
    if DENSE:
        terms = target * (y - tl.log2(target))
        dot += tl.sum(_by_lane(tl.where(target == 0.0, 0.0, terms)), axis=1)
        weight += tl.sum(_by_lane(target), axis=1)
    elif BETA:
        terms = tl.where(target, 1.0, ratio) * y
        if mask is not None:
            terms = tl.where(mask, terms, 0.0)
        dot += tl.sum(_by_lane(terms), axis=1)
        weight += slots * ratio + members * (1.0 - ratio)
    else:
        dot += tl.sum(_by_lane(tl.where(target, y, 0.0)), axis=1)
        weight += members
    return new_top, total, weight, dot


@triton.jit
def _join(state, DENSE: tl.constexpr):
    """The lanes' states as one: (5), and the sum of (7)."""
    top, total, weight, dot = state
    row_top = tl.max(top, axis=0)
    log_total = tl.log2(tl.sum(total * tl.exp2(top - row_top), axis=0))
    dot = tl.sum(dot + weight * (top - row_top), axis=0)
    if DENSE:  # a two-level target's is 1 / alpha, known
        weight = tl.sum(weight, axis=0)
    return row_top, log_total, weight, dot


@triton.jit(do_not_specialize=list(range(11)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32,
    target_ptr, target_stride: tl.int64, members_ptr, alpha: tl.float32, ratio: tl.float32,
    sum_p_log_p: tl.float32, loss_ptr, lse_ptr,
    DENSE: tl.constexpr, BETA: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    head, vectors, column, live = _row(row_ptr, vocab, VEC)
    target_ptr, target = _target(
        target_ptr, target_stride, members_ptr, row, head, column, live, vocab, DENSE, P_ALIGN
    )
    zero = tl.zeros((LANES,), tl.float32)
    state = (zero + FLOOR, zero, zero, zero)
    z_ends = _load(row_ptr + column, live, -float("inf"))
    members = tl.reshape(target, (LANES,)).to(tl.float32)
    slots = tl.reshape(live, (LANES,)).to(tl.float32)
    state = _accumulate(state, z_ends, target, live, members, slots, ratio, DENSE, BETA)

    ROUNDS: tl.constexpr = SLOTS // VEC
    ROUND: tl.constexpr = LANES * VEC
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    offsets, bit = _slots(ROUNDS, VEC)
    tiles = vectors // (LANES * ROUNDS)
    for tile in range(0, tiles):
        z = _load(body_ptr + tile * (ROUNDS * ROUND) + offsets, None, 0.0)
        if DENSE:
            p = _load(target_ptr + tile * (ROUNDS * ROUND) + offsets, None, 0.0)
        else:
            p = (tl.load(target_ptr + tile * (2 * LANES))[None, :, None] & bit) != 0
            members = tl.load(target_ptr + (2 * tile + 1) * LANES).to(tl.float32, bitcast=True)
        state = _accumulate(state, z, p, None, members, SLOTS, ratio, DENSE, BETA)
    offsets, bit = _slots(1, VEC)
    if not DENSE:
        word = tl.load(target_ptr + tiles * (2 * LANES))
    for start in range(tiles * ROUNDS, tl.cdiv(vectors, LANES)):
        mask = offsets + start * ROUND < vectors * VEC
        z = _load(body_ptr + start * ROUND + offsets, mask, -float("inf"))
        if DENSE:
            p = _load(target_ptr + start * ROUND + offsets, mask, 0.0)
        else:
            p = (word[None, :, None] & bit) != 0
            members = _count(word, VEC)
            slots = tl.where(tl.arange(0, LANES) + start * LANES < vectors, VEC + 0.0, 0.0)
            word = word >> VEC
        state = _accumulate(state, z, p, mask, members, slots, ratio, DENSE, BETA)

    row_top, log_total, weight, dot = _join(state, DENSE)
    if DENSE:
        loss = (weight * log_total - dot) / LOG2E  # (7)
    else:
        loss = sum_p_log_p + (log_total - alpha * dot) / LOG2E
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, ((row_top.to(tl.float64) + log_total) / LOG2E).to(tl.float32))


@triton.jit
def _gradient(z, lse, target, grad_loss, sum_p, alpha, ratio, dtype, DENSE: tl.constexpr):
    if DENSE:
        pull = grad_loss * -target
    else:
        pull = tl.where(target, grad_loss * -alpha, grad_loss * -alpha * ratio)
    # z - lse first: c lse rounds at 6e-8 c |lse|, which the exponential would make relative.
    return (tl.exp2((z - lse) * LOG2E) * (grad_loss * sum_p) + pull).to(dtype)  # (2)


@triton.jit(do_not_specialize=list(range(14)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32,
    target_ptr, target_stride: tl.int64, members_ptr, alpha: tl.float32, ratio: tl.float32,
    sum_p_ptr, lse_ptr, grad_loss_ptr, grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    DENSE: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    out_row_ptr = out_ptr + row * out_stride
    head, vectors, column, live = _row(row_ptr, vocab, VEC)
    target_ptr, target = _target(
        target_ptr, target_stride, members_ptr, row, head, column, live, vocab, DENSE, P_ALIGN
    )
    lse = tl.load(lse_ptr + row)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if DENSE:
        sum_p = tl.load(sum_p_ptr + row)
    else:
        sum_p = 1.0
    dtype = out_ptr.dtype.element_ty
    z_ends = _load(row_ptr + column, live, 0.0)
    grad_ends = _gradient(z_ends, lse, target, grad_loss, sum_p, alpha, ratio, dtype, DENSE)
    tl.store(out_row_ptr + column, grad_ends, live)

    ROUNDS: tl.constexpr = SLOTS // VEC
    ROUND: tl.constexpr = LANES * VEC
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    out_body_ptr = tl.multiple_of(out_row_ptr + head, 16)
    offsets, bit = _slots(ROUNDS, VEC)
    tiles = vectors // (LANES * ROUNDS)
    for tile in range(0, tiles):
        z = _load(body_ptr + tile * (ROUNDS * ROUND) + offsets, None, 0.0)
        if DENSE:
            p = _load(target_ptr + tile * (ROUNDS * ROUND) + offsets, None, 0.0)
        else:
            p = (tl.load(target_ptr + tile * (2 * LANES))[None, :, None] & bit) != 0
        grad = _gradient(z, lse, p, grad_loss, sum_p, alpha, ratio, dtype, DENSE)
        tl.store(out_body_ptr + tile * (ROUNDS * ROUND) + offsets, grad)
    offsets, bit = _slots(1, VEC)
    if not DENSE:
        word = tl.load(target_ptr + tiles * (2 * LANES))
    for start in range(tiles * ROUNDS, tl.cdiv(vectors, LANES)):
        mask = offsets + start * ROUND < vectors * VEC
        z = _load(body_ptr + start * ROUND + offsets, mask, 0.0)
        if DENSE:
            p = _load(target_ptr + start * ROUND + offsets, mask, 0.0)
        else:
            p = (word[None, :, None] & bit) != 0
            word = word >> VEC
        grad = _gradient(z, lse, p, grad_loss, sum_p, alpha, ratio, dtype, DENSE)
        tl.store(out_body_ptr + start * ROUND + offsets, grad, mask)
