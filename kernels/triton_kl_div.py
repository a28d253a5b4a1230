"""Log-softmax and KL divergence fused into two Triton kernels, forward and backward.

What. For each row z of N rows of V logits, and a target P with |P| = sum P (1 for a distribution),

    KL(P || softmax(z)) = sum P log P + |P| lse(z) - sum P z,      lse(z) = log sum e^z      (1)
    dKL/dz = |P| softmax(z) - P                                                              (2)

Forward reads the logits once and keeps two numbers a row, the loss and lse. Backward reads them
once more, rebuilds softmax(z) = e^(z - lse), and writes the gradient. No N x V matrix of
log-probabilities, probabilities or targets exists.

The target. Two-level: P = alpha on the members S and beta elsewhere. With r = beta / alpha,

    sum P z = alpha D,    D = sum w z,    w = 1 on S and r elsewhere                         (3)

so that P is one bit an element (kernels/membership.py), and if beta = 0 only members are added.
Dense: P is a tensor, (V,) for all rows or (N, V); then alpha = 1 and w = P, and D takes in the
other sum over P: D = sum P (z - log P).

Who owns what. A program works on one row. Its LANES = 128 threads, called lanes, read 16 bytes at
a time, which are `vec` elements: 4 of float32, 8 of bfloat16 or float16. One such vector for every
lane is a round; SLOTS = 32 elements for every lane, 8 or 4 rounds, are a tile.

    address    ..0            16             32                                      end of row
    row          [ z0 z1 z2 | z3 z4 z5 z6  | z7 ..   | z50251 .. z50254 | z50255 z50256 ]
                   head       lane 0         lane 1    ...                tail
    head, tail   fewer than `vec` elements each; one scalar access a lane for both together
    vectors      whole tiles without a mask; then the rounds that are left, masked by the vector

A lane's maximum and sums stay in its registers: no shuffle and no barrier inside the main loops.

Online log-sum-exp. The largest logit must leave the exponent before the exponential, but is known
only at the end of the row. So each lane keeps a maximum m and the sum t of 2^(c z - m), where
c = log2 e: the hardware has 2^x and no e^x, and y = c z - m is one fused multiply-add. For the
elements that a lane reads at a time, the ends, a tile or a round,

    m' = max(m, max of c z),    y = c z - m',    t' = t 2^(m - m') + sum of 2^y              (4)

One exponential an element, and one a tile to rescale. Lanes are joined once, at the row's end:

    M = max m,    t = sum over lanes of t 2^(m - M),    lse = (M + log2 t) / c               (5)

Last digits. GPT-2's logits lie near -80, where neighbouring float32 values are 8e-6 apart. lse and
alpha D are as large as that, and the loss is their difference, which is small. So a lane sums not
w z but w y: y is at hand, and the smaller the closer the logit is to the largest one. That sum, d,
must follow m when m moves, which takes the sum u of the weights w:

    d' = d + u (m - m') + sum of w y,    u' = u + sum of w                                   (6)

Dense: w y becomes P (y - log2 P). u is not added up element by element: the membership table
holds the number of members of each lane and tile. In (1), M appears in lse and in D and cancels:

    KL = sum P log P + (|P| log2 t - alpha sum over lanes of (d + u (m - M))) / c            (7)

d and u (m - M) are in logarithms to base 2, which 1 / c turns into nats. Dense: sum P log P is in
d already.

In the code. Of a lane: m top, t total, u weight, d dot. Of a row: M row_top, log2 t log_total,
|P| sum_p. c is LOG2E, r ratio; g, the upstream gradient of a row's loss, is grad_loss, -g P pull.

Traffic of loss and gradient, in N V elements, for P of shape (V,):

    unfused, by operators   log_softmax      reads z, writes log q                     2
                            P log q          reads log q, writes the product           2
                            P log P - that   reads it, writes the terms                2
                            sum over the row reads the terms                           1
                            backwards        of the difference: writes -g              1
                                             of the product: reads -g, writes -g P     2
                                             of log_softmax: reads -g P and log q,
                                             writes dz                                 3   in all 13
    fused                   forward          reads z                                   1
                            backward         reads z, writes dz                        2   in all  3

P of shape (N, V) adds 5 (read by three operators; P log P written and read) and 3 (read forward,
backward, and for |P|).

Alignment. V = 50,257 is odd. A row at an odd offset, or a mask `column < V`, makes the compiler
fall back on 2- or 4-byte accesses. Hence: start at the row's first 16-byte boundary, mask whole
vectors only, tell the compiler (tl.multiple_of), and leave the ends to scalars. Padding rows to a
stride of 50,304 makes every head empty, but is not needed: contiguous logits, any stride and any
storage offset take the same path. Nothing outside a row is read or written. Two cases are slower:
a gradient out of step with the logits' boundaries goes through a buffer and a copy, and a dense P
out of step is read by scalars (kernels/triton_launch.py).

Hazards.
- -inf - (-inf) is NaN, in (4) for a tile of -inf: the maximum starts at FLOOR, which is finite.
- 0 * -inf is NaN: a logit where P = 0 is left out by a select, never by a product with 0.
- NaN and +inf reach t (inf - inf), so loss and gradient of their row, and of no other.
- -inf where P > 0 makes d -inf and the loss +inf; its gradient is finite, -P, as in PyTorch.
- Offsets of rows exceed 2^31 elements at N = 42,731: they are computed in int64.
- softmax - P cancels near convergence: formed in float32 and rounded once, at the store.
- Specialised on no argument: one compiled variant a dtype and kind of target (for a dense P also
  its dtype, and whether it is in step), whatever N, V and strides are.

What this does not do. No float64 logits, and no double backward. The gradient's relative error is
that of lse in float32, 6e-8 |lse|. Rows are not split over programs: fewer rows than
multiprocessors leave some idle.
"""

# Triton compiles the functions below, so they follow its rules and not Python's:
# ruff: noqa: RET505, SIM108
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import membership

LANES = tl.constexpr(membership.LANES)
SLOTS = tl.constexpr(membership.SLOTS)
LOG2E = tl.constexpr(1.44269502162933349609375)  # rounded to float32
FLOOR = tl.constexpr(-1e38)  # below every finite c z, and -inf - FLOOR is no NaN


@triton.jit
def _row(row_ptr, vocab, VEC: tl.constexpr):
    """The row cut up: elements in head, number of vectors, and each lane's element of the ends.

    The first VEC lanes have the head, the next VEC the tail: column and live, (1, LANES, 1), say
    which element a lane has, and whether it has one.
    """
    to_boundary = ((-row_ptr.to(tl.int64)) & 15).to(tl.int32)
    head = tl.minimum(to_boundary // (16 // VEC), vocab)
    vectors = (vocab - head) // VEC
    lane = tl.arange(0, LANES)[None, :, None]
    column = tl.where(lane < VEC, lane, head + vectors * VEC + lane - VEC)
    return head, vectors, column, tl.where(lane < VEC, lane < head, column < vocab)


@triton.jit
def _slots(ROUNDS: tl.constexpr, VEC: tl.constexpr):
    """Of each slot of ROUNDS rounds, (ROUNDS, LANES, VEC): its offset, its bit in a lane's word."""
    rounds = tl.arange(0, ROUNDS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    element = tl.arange(0, VEC)[None, None, :]
    return (rounds * LANES + lane) * VEC + element, 1 << (rounds * VEC + element)


@triton.jit
def _load(ptr, mask, OTHER: tl.constexpr):
    """As float32; OTHER where the mask, if there is one, is false."""
    if mask is None:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask, other=OTHER).to(tl.float32)


@triton.jit
def _count(word, BITS: tl.constexpr):
    """How many of each word's lowest BITS are set, as float32."""
    count = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(BITS):
        count += tl.where((word & (1 << i)) != 0, 1.0, 0.0)
    return count


@triton.jit
def _target(ptr, stride, members_ptr, row, head, column, live, vocab,
            DENSE: tl.constexpr, P_ALIGN: tl.constexpr):  # fmt: skip
    """Where the target of the row's vectors starts, and the target of the ends, (1, LANES, 1).

    Dense: a pointer to the first vector's P, and P. Two-level: pointers to each lane's first word
    in the table of this head, and who is a member, one byte each; a head has tiles * 2 * LANES
    words (kernels/membership.py).
    """
    if DENSE:
        ptr += row * stride
        return tl.multiple_of(ptr + head, P_ALIGN), _load(ptr + column, live, 0.0)
    else:
        ends = tl.load(members_ptr + column, live, other=0) != 0
        table = head * (vocab // (LANES * SLOTS) + 1) * (2 * LANES)
        return ptr + table + tl.arange(0, LANES), ends


@triton.jit
def _tile_target(ptr, tile, offsets, bit, DENSE: tl.constexpr):
    """The target of a whole tile: P, or who is a member, (rounds, LANES, VEC)."""
    if DENSE:
        return _load(ptr + tile * (LANES * SLOTS) + offsets, None, 0.0)
    else:
        return (tl.load(ptr + tile * (2 * LANES))[None, :, None] & bit) != 0


@triton.jit
def _by_lane(x):
    """(rounds, LANES, VEC) -> (LANES, rounds * VEC); the last axis lies inside a thread."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (LANES, x.shape[0] * x.shape[2]))


@triton.jit
def _accumulate(state, z, target, mask, members, slots, ratio,
                DENSE: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """(4) and (6) for the logits z that a lane reads at a time, (rounds, LANES, VEC).

    target: P, or who is a member. Of a two-level target, a lane has `members` among `slots`
    elements; off the mask, z is -inf.
    """
    top, total, weight, dot = state
    new_top = tl.maximum(top, tl.max(_by_lane(z), axis=1) * LOG2E)
    y = z * LOG2E - new_top[None, :, None]
    shift = top - new_top
    total = total * tl.exp2(shift) + tl.sum(_by_lane(tl.exp2(y)), axis=1)  # (4)
    dot += weight * shift  # (6), as is the rest
    if DENSE:
        terms = target * (y - tl.log2(target))
        dot += tl.sum(_by_lane(tl.where(target == 0.0, 0.0, terms)), axis=1)
        weight += tl.sum(_by_lane(target), axis=1)
    elif BETA:
        terms = tl.where(target, 1.0, ratio) * y  # (3)
        if mask is not None:
            terms = tl.where(mask, terms, 0.0)
        dot += tl.sum(_by_lane(terms), axis=1)
        weight += slots * ratio + members * (1.0 - ratio)
    else:
        dot += tl.sum(_by_lane(tl.where(target, y, 0.0)), axis=1)  # (3), r = 0
        weight += members
    return new_top, total, weight, dot


@triton.jit
def _join(state, DENSE: tl.constexpr):
    """The lanes' states as one: M and log2 t of (5), sum of u if dense, the sum over d of (7)."""
    top, total, weight, dot = state
    row_top = tl.max(top, axis=0)
    log_total = tl.log2(tl.sum(total * tl.exp2(top - row_top), axis=0))  # (5)
    dot = tl.sum(dot + weight * (top - row_top), axis=0)  # (7)
    if DENSE:  # |P|; of a two-level target it is 1, and the sum of u 1 / alpha
        weight = tl.sum(weight, axis=0)
    return row_top, log_total, weight, dot


@triton.jit(do_not_specialize=list(range(11)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32,
    target_ptr, target_stride: tl.int64, members_ptr, alpha: tl.float32, ratio: tl.float32,
    sum_p_log_p: tl.float32, loss_ptr, lse_ptr,
    DENSE: tl.constexpr, BETA: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Loss and lse, float32 (N,), of the row that has the program's number, in nats.

    logits_ptr: (N, V), rows `stride` elements apart, V = vocab.
    target_ptr: DENSE, P in rows `target_stride` apart, 0 for (V,), its vectors on boundaries of
        P_ALIGN bytes; else the words of kernels/membership.py. members_ptr: uint8 (V,), the ends'.
    alpha, ratio, sum_p_log_p: as in (3) and (1); of a dense P 1, 0 and 0. BETA: beta > 0.
    VEC: elements in 16 bytes of logits.
    """
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
        z = _load(body_ptr + tile * (LANES * SLOTS) + offsets, None, 0.0)
        p = _tile_target(target_ptr, tile, offsets, bit, DENSE)
        if not DENSE:
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

    row_top, log_total, sum_p, dot = _join(state, DENSE)
    if DENSE:
        loss = (sum_p * log_total - dot) / LOG2E  # (1), as (7) has it
    else:
        loss = sum_p_log_p + (log_total - alpha * dot) / LOG2E  # (1), as (7) has it
    tl.store(loss_ptr + row, loss)
    # (5), one sum a row in float64: backward takes the error of lse as the gradient's relative one.
    tl.store(lse_ptr + row, ((row_top.to(tl.float64) + log_total) / LOG2E).to(tl.float32))


@triton.jit
def _gradient(z, lse, target, grad_loss, sum_p, alpha, ratio, dtype, DENSE: tl.constexpr):
    """g times (2), in float32, rounded to dtype; the target is P, or who is a member."""
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
    """The gradient of the row that has the program's number: g times (2), to out (N, V).

    From logits_ptr to ratio, and constants: as in forward_kernel. sum_p_ptr: float32 (N,), read
    if DENSE. lse_ptr: float32 (N,), from forward. grad_loss_ptr: g, (N,), any stride.
    out_ptr: rows `out_stride` apart, in step with the logits' boundaries; or the logits.
    """
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
        z = _load(body_ptr + tile * (LANES * SLOTS) + offsets, None, 0.0)
        p = _tile_target(target_ptr, tile, offsets, bit, DENSE)
        grad = _gradient(z, lse, p, grad_loss, sum_p, alpha, ratio, dtype, DENSE)
        tl.store(out_body_ptr + tile * (LANES * SLOTS) + offsets, grad)
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
