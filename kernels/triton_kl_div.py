"""Log-softmax and KL divergence fused into two Triton kernels, forward and backward."""

# Triton's constants are written in capitals, and its functions are no Python functions:
# ruff: noqa: N803, SIM108, RET505
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.target import Target, TwoLevelTarget

LANES = tl.constexpr(128)  # threads of a program; one program a row
SLOTS = tl.constexpr(32)  # elements a lane owns in a tile; one 32-bit word holds their membership
BLOCK = tl.constexpr(128 * 32)  # elements of a tile
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
def _ragged(head, tail, vocab, VEC: tl.constexpr):
    """The columns outside the vectors, at most one a lane, and which lanes have one."""
    lane = tl.arange(0, LANES)
    column = tl.where(lane < VEC, lane, tail + lane - VEC)
    return column, tl.where(lane < VEC, lane < head, column < vocab)


@triton.jit
def _slots(VEC: tl.constexpr):
    """A tile is (rounds, LANES, VEC): each slot's bit in its lane's word, and its offset."""
    rounds = tl.arange(0, SLOTS // VEC)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    element = tl.arange(0, VEC)[None, None, :]
    return 1 << (rounds * VEC + element), (rounds * LANES + lane) * VEC + element


@triton.jit
def _load(ptr, mask, OTHER: tl.constexpr):
    if mask is None:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask, other=OTHER).to(tl.float32)


@triton.jit
def _load_target(ptr, tile, offsets, bit, mask, DENSE: tl.constexpr):
    """P of a dense target; else which elements are members."""
    if DENSE:
        return _load(ptr + tile * BLOCK + offsets, mask, 0.0)
    else:
        word = tl.load(ptr + tile * LANES + tl.arange(0, LANES))
        return (word[None, :, None] & bit) != 0


@triton.jit
def _sum(x):
    """(rounds, LANES, VEC) -> (LANES,): both axes lie inside a thread, so no shuffle."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _weigh(z, target, live, ratio, DENSE: tl.constexpr, NO_BETA: tl.constexpr):
    """The terms of sum P z, up to alpha; for a dense target of sum P (z - log P)."""
    if DENSE:
        log_p = tl.log2(tl.where(target == 0.0, 1.0, target)) * LN_2
        weighted = tl.where(target == 0.0, 0.0, target * (z - log_p))
    elif NO_BETA:
        weighted = tl.where(target, z, 0.0)
    else:
        weighted = tl.where(target, 1.0, ratio) * z
    if live is None:
        return weighted
    else:
        return tl.where(live, weighted, 0.0)


@triton.jit
def _accumulate(top, total, dot, mass, z, target, live, ratio, DENSE: tl.constexpr, NO_BETA: tl.constexpr):
    dot += _sum(_weigh(z, target, live, ratio, DENSE, NO_BETA))
    if DENSE:
        mass += _sum(target)
    new_top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0) * LOG2_E)
    total = total * tl.exp2(top - new_top)
    total += _sum(tl.exp2(z * LOG2_E - new_top[None, :, None]))
    return new_top, total, dot, mass


@triton.jit(do_not_specialize=list(range(11)))
def forward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, target_ptr, target_stride: tl.int64,
    members_ptr, alpha: tl.float32, ratio: tl.float32, sum_p_log_p: tl.float32, loss_ptr, lse_ptr,
    DENSE: tl.constexpr, NO_BETA: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    head, vectors, tail = _sections(row_ptr, vocab, VEC)
    column, live = _ragged(head, tail, vocab, VEC)
    ends = _load(row_ptr + column, live, -float("inf"))
    if DENSE:
        members_ptr = target_ptr + row * target_stride
        target_ptr = tl.multiple_of(members_ptr + head, P_ALIGN)
        p_ends = _load(members_ptr + column, live, 0.0)
    else:
        p_ends = tl.load(members_ptr + column, live, other=0) != 0
        target_ptr += head * tl.cdiv(vocab, BLOCK) * LANES
    top = tl.maximum(ends * LOG2_E, FLOOR)
    total = tl.exp2(ends * LOG2_E - top)
    dot = _weigh(ends, p_ends, live, ratio, DENSE, NO_BETA)
    mass = p_ends.to(tl.float32)

    body_ptr = tl.multiple_of(row_ptr + head, 16)
    bit, offsets = _slots(VEC)
    full = vectors * VEC // BLOCK
    for tile in range(0, full):
        z = _load(body_ptr + tile * BLOCK + offsets, None, 0.0)
        target = _load_target(target_ptr, tile, offsets, bit, None, DENSE)
        top, total, dot, mass = _accumulate(
            top, total, dot, mass, z, target, None, ratio, DENSE, NO_BETA
        )
    for tile in range(full, tl.cdiv(vectors * VEC, BLOCK)):
        mask = tile * BLOCK + offsets < vectors * VEC
        z = _load(body_ptr + tile * BLOCK + offsets, mask, -float("inf"))
        target = _load_target(target_ptr, tile, offsets, bit, mask, DENSE)
        top, total, dot, mass = _accumulate(
            top, total, dot, mass, z, target, mask, ratio, DENSE, NO_BETA
        )

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
def _gradient(z, lse, scale, target, grad_loss, alpha, beta, DENSE: tl.constexpr):
    softmax = tl.exp2(z * LOG2_E - lse)
    if DENSE:
        weight = grad_loss * target
    else:
        weight = tl.where(target, grad_loss * alpha, grad_loss * beta)
    return softmax * scale - weight


@triton.jit(do_not_specialize=list(range(14)))
def backward_kernel(
    logits_ptr, stride: tl.int64, vocab: tl.int32, target_ptr, target_stride: tl.int64,
    members_ptr, alpha: tl.float32, ratio: tl.float32, mass_ptr, lse_ptr, grad_loss_ptr,
    grad_loss_stride: tl.int64, out_ptr, out_stride: tl.int64,
    DENSE: tl.constexpr, P_ALIGN: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    out_row_ptr = out_ptr + row * out_stride
    head, vectors, tail = _sections(row_ptr, vocab, VEC)
    column, live = _ragged(head, tail, vocab, VEC)
    ends = _load(row_ptr + column, live, -float("inf"))
    lse = tl.load(lse_ptr + row) * LOG2_E
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride)
    scale = grad_loss
    beta = alpha * ratio
    if DENSE:
        scale *= tl.load(mass_ptr + row)
        members_ptr = target_ptr + row * target_stride
        target_ptr = tl.multiple_of(members_ptr + head, P_ALIGN)
        p_ends = _load(members_ptr + column, live, 0.0)
    else:
        p_ends = tl.load(members_ptr + column, live, other=0) != 0
        target_ptr += head * tl.cdiv(vocab, BLOCK) * LANES
    grad_ends = _gradient(ends, lse, scale, p_ends, grad_loss, alpha, beta, DENSE)
    tl.store(out_row_ptr + column, grad_ends.to(out_ptr.dtype.element_ty), live)

    body_ptr = tl.multiple_of(row_ptr + head, 16)
    out_body_ptr = tl.multiple_of(out_row_ptr + head, 16)
    bit, offsets = _slots(VEC)
    full = vectors * VEC // BLOCK
    for tile in range(0, full):
        z = _load(body_ptr + tile * BLOCK + offsets, None, 0.0)
        target = _load_target(target_ptr, tile, offsets, bit, None, DENSE)
        grad = _gradient(z, lse, scale, target, grad_loss, alpha, beta, DENSE)
        tl.store(out_body_ptr + tile * BLOCK + offsets, grad.to(out_ptr.dtype.element_ty))
    for tile in range(full, tl.cdiv(vectors * VEC, BLOCK)):
        mask = tile * BLOCK + offsets < vectors * VEC
        z = _load(body_ptr + tile * BLOCK + offsets, mask, -float("inf"))
        target = _load_target(target_ptr, tile, offsets, bit, mask, DENSE)
        grad = _gradient(z, lse, scale, target, grad_loss, alpha, beta, DENSE)
        tl.store(out_body_ptr + tile * BLOCK + offsets, grad.to(out_ptr.dtype.element_ty), mask)


_WORDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def membership_words(members: Tensor, vec: int) -> Tensor:
    """int32 (vec, tiles, LANES): for each length of the head, each lane's 32 bits of each tile.

    Bit r * vec + v of word [head, t, lane] is the membership of column
    head + t * BLOCK + (r * LANES + lane) * vec + v; 0 beyond the vocabulary.
    """
    cached = _WORDS.setdefault(members, {})
    if vec not in cached:
        block, lanes, slots = BLOCK.value, LANES.value, SLOTS.value
        vocab = members.numel()
        tiles = triton.cdiv(vocab, block)
        padded = members.new_zeros(tiles * block + vec)
        padded[:vocab] = members
        heads = padded.unfold(0, tiles * block, 1)[:vec]
        bits = heads.reshape(vec, tiles, slots // vec, lanes, vec).transpose(2, 3)
        powers = 1 << torch.arange(slots, device=members.device)
        words = (bits.reshape(vec, tiles, lanes, slots) * powers).sum(-1)
        cached[vec] = words.to(torch.int32)  # wraps: bit 31 is the sign
    return cached[vec]


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
    return LANES.value // (64 if torch.version.hip else 32)


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
            VEC=16 // logits.element_size(),
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
            VEC=16 // logits.element_size(),
            num_warps=_num_warps(),
        )
