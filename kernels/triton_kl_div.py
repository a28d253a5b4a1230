"""Log-softmax and KL divergence fused into two Triton kernels, forward and backward."""

# Triton's constants are written in capitals, and its functions are no Python functions:
# ruff: noqa: N803, SIM108
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.target import Target, TwoLevelTarget

LANES = 128  # threads of a program; one program a row
SLOTS = 32  # elements a lane owns in a tile; one 32-bit word holds their membership
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e38)  # the maximum starts here, not at -inf: -inf - -inf is NaN


@triton.jit
def _sections(row_ptr, vocab, VEC: tl.constexpr):
    """The row as [0, head) | `vectors` aligned 16-byte vectors | [tail, vocab)."""
    to_boundary = (-row_ptr.to(tl.int64)) & 15
    head = tl.minimum(to_boundary // (16 // VEC), vocab).to(tl.int32)
    vectors = (vocab - head) // VEC
    return head, vectors, head + vectors * VEC


@triton.jit
def _ragged(head, tail, vocab, LANES: tl.constexpr, VEC: tl.constexpr):
    """The columns outside the vectors, at most one a lane, and which lanes have one."""
    lane = tl.arange(0, LANES)
    column = tl.where(lane < VEC, lane, tail + lane - VEC)
    return column, tl.where(lane < VEC, lane < head, column < vocab)


@triton.jit
def _slots(LANES: tl.constexpr, SLOTS: tl.constexpr, VEC: tl.constexpr):
    """A tile is (rounds, LANES, VEC): each slot's bit in its lane's word, and its vector."""
    rounds = tl.arange(0, SLOTS // VEC)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    slot = rounds * VEC + tl.arange(0, VEC)[None, None, :]
    return slot, rounds * LANES + lane


@triton.jit
def _sum(x):
    """(rounds, LANES, VEC) -> (LANES,): both axes lie inside a thread, so no shuffle."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _weigh(z, member_or_p, live, ratio, DENSE: tl.constexpr, NO_BETA: tl.constexpr):
    """The terms of sum P z, up to alpha; for a dense target of sum P (z - log P)."""
    if DENSE:
        p = member_or_p
        return tl.where(p == 0.0, 0.0, p * (z - tl.log2(tl.where(p == 0.0, 1.0, p)) * LN_2))
    if NO_BETA:
        return tl.where(member_or_p & live, z, 0.0)
    return tl.where(live, tl.where(member_or_p, 1.0, ratio) * z, 0.0)


@triton.jit
def _load_target(
    p_ptr,
    tile,
    mask,
    slot,
    vector,
    DENSE: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    VEC: tl.constexpr,
):
    if DENSE:
        pointers = p_ptr + tile * (LANES * SLOTS) + vector * VEC + slot % VEC
        if mask is None:
            return tl.load(pointers).to(tl.float32)
        return tl.load(pointers, mask, other=0.0).to(tl.float32)
    word = tl.load(p_ptr + tile * LANES + tl.arange(0, LANES))
    return (word[None, :, None] & (1 << slot)) != 0


@triton.jit(do_not_specialize=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
def forward_kernel(
    logits_ptr,
    stride: tl.int64,
    vocab: tl.int32,
    target_ptr,
    target_stride: tl.int64,
    members_ptr,
    alpha: tl.float32,
    ratio: tl.float32,
    sum_p_log_p: tl.float32,
    loss_ptr,
    lse_ptr,
    DENSE: tl.constexpr,
    NO_BETA: tl.constexpr,
    P_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    head, vectors, tail = _sections(row_ptr, vocab, VEC)
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    TILE: tl.constexpr = LANES * SLOTS // VEC
    if DENSE:
        p_ptr = target_ptr + row * target_stride
        ends_ptr = p_ptr
        p_ptr = tl.multiple_of(p_ptr + head, P_ALIGN)
    else:
        p_ptr = target_ptr + head * tl.cdiv(vocab, LANES * SLOTS) * LANES
        ends_ptr = members_ptr

    column, live = _ragged(head, tail, vocab, LANES, VEC)
    z = tl.load(row_ptr + column, live, other=-float("inf")).to(tl.float32)
    p = tl.load(ends_ptr + column, live, other=0).to(tl.float32)
    top = tl.maximum(z * LOG2_E, FLOOR)
    total = tl.exp2(z * LOG2_E - top)
    if DENSE:
        dot = _weigh(z, p, live, ratio, DENSE, NO_BETA)
    else:
        dot = _weigh(z, p != 0, live, ratio, DENSE, NO_BETA)
    mass = p

    slot, vector = _slots(LANES, SLOTS, VEC)
    offsets = vector * VEC + slot % VEC
    for tile in range(0, vectors // TILE):
        z = tl.load(body_ptr + tile * (LANES * SLOTS) + offsets).to(tl.float32)
        p = _load_target(p_ptr, tile, None, slot, vector, DENSE, LANES, SLOTS, VEC)
        dot += _sum(_weigh(z, p, True, ratio, DENSE, NO_BETA))
        if DENSE:
            mass += _sum(p)
        new_top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0) * LOG2_E)
        total = total * tl.exp2(top - new_top)
        total += _sum(tl.exp2(z * LOG2_E - new_top[None, :, None]))
        top = new_top
    for tile in range(vectors // TILE, tl.cdiv(vectors, TILE)):
        mask = tile * TILE + vector < vectors
        z = tl.load(body_ptr + tile * (LANES * SLOTS) + offsets, mask, other=-float("inf"))
        z = z.to(tl.float32)
        p = _load_target(p_ptr, tile, mask, slot, vector, DENSE, LANES, SLOTS, VEC)
        dot += _sum(_weigh(z, p, mask, ratio, DENSE, NO_BETA))
        if DENSE:
            mass += _sum(p)
        new_top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0) * LOG2_E)
        total = total * tl.exp2(top - new_top)
        total += _sum(tl.exp2(z * LOG2_E - new_top[None, :, None]))
        top = new_top

    row_top = tl.max(top, axis=0)
    lse = (row_top + tl.log2(tl.sum(total * tl.exp2(top - row_top), axis=0))) * LN_2
    dot = tl.sum(dot, axis=0)
    if DENSE:
        loss = lse * tl.sum(mass, axis=0) - dot
    else:
        loss = sum_p_log_p + (lse - alpha * dot)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _gradient(z, lse, scale, p, grad_loss, alpha, beta, DENSE: tl.constexpr):
    softmax = tl.exp2(z * LOG2_E - lse)
    if DENSE:
        weight = grad_loss * p
    else:
        weight = tl.where(p, grad_loss * alpha, grad_loss * beta)
    return softmax * scale - weight


@triton.jit(do_not_specialize=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
def backward_kernel(
    logits_ptr,
    stride: tl.int64,
    vocab: tl.int32,
    target_ptr,
    target_stride: tl.int64,
    members_ptr,
    alpha: tl.float32,
    ratio: tl.float32,
    mass_ptr,
    lse_ptr,
    grad_loss_ptr,
    grad_loss_stride: tl.int64,
    out_ptr,
    out_stride: tl.int64,
    DENSE: tl.constexpr,
    P_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    out_row_ptr = out_ptr + row * out_stride
    head, vectors, tail = _sections(row_ptr, vocab, VEC)
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    out_body_ptr = tl.multiple_of(out_row_ptr + head, 16)
    TILE: tl.constexpr = LANES * SLOTS // VEC
    lse = tl.load(lse_ptr + row) * LOG2_E
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    scale = grad_loss
    beta = alpha * ratio
    if DENSE:
        scale = grad_loss * tl.load(mass_ptr + row)
        p_ptr = target_ptr + row * target_stride
        ends_ptr = p_ptr
        p_ptr = tl.multiple_of(p_ptr + head, P_ALIGN)
    else:
        p_ptr = target_ptr + head * tl.cdiv(vocab, LANES * SLOTS) * LANES
        ends_ptr = members_ptr

    column, live = _ragged(head, tail, vocab, LANES, VEC)
    z = tl.load(row_ptr + column, live, other=-float("inf")).to(tl.float32)
    p = tl.load(ends_ptr + column, live, other=0)
    if DENSE:
        p = p.to(tl.float32)
    else:
        p = p != 0
    grad = _gradient(z, lse, scale, p, grad_loss, alpha, beta, DENSE)
    tl.store(out_row_ptr + column, grad.to(out_ptr.dtype.element_ty), live)

    slot, vector = _slots(LANES, SLOTS, VEC)
    offsets = vector * VEC + slot % VEC
    for tile in range(0, vectors // TILE):
        z = tl.load(body_ptr + tile * (LANES * SLOTS) + offsets).to(tl.float32)
        p = _load_target(p_ptr, tile, None, slot, vector, DENSE, LANES, SLOTS, VEC)
        grad = _gradient(z, lse, scale, p, grad_loss, alpha, beta, DENSE)
        grad = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_body_ptr + tile * (LANES * SLOTS) + offsets, grad)
    for tile in range(vectors // TILE, tl.cdiv(vectors, TILE)):
        mask = tile * TILE + vector < vectors
        z = tl.load(body_ptr + tile * (LANES * SLOTS) + offsets, mask, other=-float("inf"))
        z = z.to(tl.float32)
        p = _load_target(p_ptr, tile, mask, slot, vector, DENSE, LANES, SLOTS, VEC)
        grad = _gradient(z, lse, scale, p, grad_loss, alpha, beta, DENSE)
        grad = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_body_ptr + tile * (LANES * SLOTS) + offsets, grad, mask)


_WORDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def membership_words(members: Tensor, vec: int) -> Tensor:
    """int32 (vec, tiles, LANES): for each length of the head, each lane's 32 bits of each tile.

    Bit r * vec + v of word [head, t, lane] is the membership of column
    head + t * LANES * SLOTS + (r * LANES + lane) * vec + v; 0 beyond the vocabulary.
    """
    cached = _WORDS.setdefault(members, {})
    if vec not in cached:
        vocab = members.numel()
        tiles = triton.cdiv(vocab, LANES * SLOTS)
        padded = members.new_zeros(tiles * LANES * SLOTS + vec)
        padded[:vocab] = members
        heads = padded.unfold(0, tiles * LANES * SLOTS, 1)[:vec]
        bits = heads.reshape(vec, tiles, SLOTS // vec, LANES, vec).transpose(2, 3)
        powers = 1 << torch.arange(SLOTS, device=members.device)
        words = (bits.reshape(vec, tiles, LANES, SLOTS) * powers).sum(-1)
        cached[vec] = words.to(torch.int32)  # wraps: bit 31 is the sign
    return cached[vec]


def meta(dtype: torch.dtype) -> dict[str, int]:
    """The constants that the launcher and the report compile with."""
    return {"LANES": LANES, "SLOTS": SLOTS, "VEC": 16 // dtype.itemsize}


def _phase(x: Tensor, modulus: int) -> tuple[int, int]:
    """Where rows start: elements past a boundary, of the first row and from row to row."""
    stride = x.stride(0) if x.ndim == 2 and x.shape[0] > 1 else 0
    return x.data_ptr() // x.element_size() % modulus, stride % modulus


def _target_arguments(logits: Tensor, target: Target) -> tuple:
    """The kernels' arguments from target_ptr on, and the two constants that depend on it."""
    vec = 16 // logits.element_size()
    if isinstance(target, TwoLevelTarget):
        members = target.members
        words = membership_words(members, vec)
        return (words, 0, members.view(torch.uint8), target.alpha, target.beta / target.alpha), 1
    if target.dtype == torch.float64 or target.stride(-1) != 1:
        target = target.float().contiguous()
    # P's vectors are loaded whole if its rows keep step with the logits' rows.
    bytes_ = min(16, vec * target.element_size())
    step = bytes_ // target.element_size()
    logits_phase = _phase(logits, step)
    target_phase = _phase(target, step)
    align = bytes_ if logits_phase == target_phase else target.element_size()
    stride = target.stride(0) if target.ndim == 2 else 0
    return (target, stride, target, 1.0, 0.0), align


def _num_warps() -> int:
    return LANES // (64 if torch.version.hip else 32)


def forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """One KL divergence and one log-sum-exp a row, in nats."""
    loss, lse = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    if logits.shape[0] == 0:
        return loss, lse
    arguments, align = _target_arguments(logits, target)
    dense = isinstance(target, Tensor)
    with torch.cuda.device_of(logits):
        forward_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            logits.shape[1],
            *arguments,
            0.0 if isinstance(target, Tensor) else target.sum_p_log_p,
            loss,
            lse,
            DENSE=dense,
            NO_BETA=isinstance(target, Tensor) or target.beta == 0,
            P_ALIGN=align,
            **meta(logits.dtype),
            num_warps=_num_warps(),
        )
    return loss, lse


def backward(logits: Tensor, lse: Tensor, target: Target, grad_loss: Tensor, out: Tensor) -> None:
    """d(grad_loss . KL)/d logits into out, which may be the logits."""
    if logits.shape[0] == 0:
        return
    vec = 16 // logits.element_size()
    if _phase(out, vec) != _phase(logits, vec):
        step = torch.empty_strided(
            logits.shape, logits.stride(), dtype=out.dtype, device=out.device
        )
        backward(logits, lse, target, grad_loss, step)
        out.copy_(step)
        return
    arguments, align = _target_arguments(logits, target)
    dense = isinstance(target, Tensor)
    mass = lse
    if isinstance(target, Tensor):
        mass = target.sum(-1, dtype=torch.float32).expand(lse.shape)
    mass = mass.contiguous()
    with torch.cuda.device_of(logits):
        backward_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            logits.shape[1],
            *arguments,
            mass,
            lse,
            grad_loss,
            grad_loss.stride(0),
            out,
            out.stride(0),
            DENSE=dense,
            P_ALIGN=align,
            **meta(logits.dtype),
            num_warps=_num_warps(),
        )
