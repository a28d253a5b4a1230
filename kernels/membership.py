"""Who is a member, one bit an element, in the order in which the Triton kernels read logits.

A tile of logits is (rounds, LANES, vec): in each round each lane loads one 16-byte vector of `vec`
elements, so a lane owns SLOTS = rounds * vec elements of a tile and needs SLOTS bits: one word.

             lane 0     lane 1           lane 127
    round 0  0 1 2 3    4 5 6 7    ...   508 .. 511       vec = 4: float32
    round 1  512 ..     516 ..     ...         1023
    ...                                                   word of lane 0, from bit 0 up:
    round 7  3584 ..    3588 ..    ...         4095       0 1 2 3 512 513 514 515 ... 3587

A byte an element would be eight times the traffic, and Triton would give it a layout of its own,
in which the lanes' 16-byte vectors of logits no longer lie side by side.

The vectors of a row start at its first 16-byte boundary, `head` elements in. In contiguous logits
with an odd vocabulary, head differs from row to row, so there is one table for each head < vec.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LANES = 128  # threads of a program
SLOTS = 32  # elements that a lane owns in a tile

_TABLES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # members -> vec -> table


def membership_words(members: Tensor, vec: int) -> Tensor:
    """The table, int32 (vec, tiles, 2, LANES), made on the first call, kept while members lives.

    Bit r * vec + v of word [head, t, 0, lane] is the membership of column
    head + ((t * rounds + r) * LANES + lane) * vec + v; 0 beyond the last whole vector of the row.
    [head, t, 1, lane] is the number of bits set in it, as the bits of a float32.

    Args:
        members: bool (V,), not to be changed afterwards.
        vec: elements in 16 bytes of logits, 4 or 8.
    """
    tables = _TABLES.setdefault(members, {})
    if vec not in tables:
        tables[vec] = _pack(members, vec)
    return tables[vec]


def _pack(members: Tensor, vec: int) -> Tensor:
    vocab, device = members.numel(), members.device
    tiles = vocab // (LANES * SLOTS) + 1  # a partial one, even if it is empty
    columns = tiles * LANES * SLOTS
    padded = F.pad(members, (0, columns + vec - vocab))
    shifted = padded.unfold(0, columns, 1)[:vec]  # row h starts at column h
    head = torch.arange(vec, device=device)[:, None]
    in_vectors = torch.arange(columns, device=device) < (vocab - head) // vec * vec
    bits = (shifted & in_vectors).view(vec, tiles, SLOTS // vec, LANES, vec).transpose(2, 3)
    weights = 1 << torch.arange(SLOTS, device=device)
    bits = bits.reshape(vec, tiles, LANES, SLOTS)
    words = (bits * weights).sum(-1)
    counts = bits.sum(-1, dtype=torch.float32).view(torch.int32)
    return torch.stack((words.to(torch.int32), counts), 2)  # bit 31 becomes the sign
