"""Bitmask of the target tokens, in the order in which the Triton kernels load logits.

A program of THREADS threads works through a row of logits in tiles. In a tile, each thread loads
PER_THREAD elements, as vectors of `vec` elements (16 bytes); one vector per thread is a round:

             thread 0    thread 1            thread 255
    round 0  0 1 2 3     4 5 6 7      ...    1020 .. 1023      vec = 4: float32
    round 1  1024 ..     1028 ..      ...            2047
    round 2  2048 ..     2052 ..      ...            3071      bits of thread 0, from bit 0 up:
    round 3  3072 ..     3076 ..      ...            4095      0 1 2 3 1024 .. 1027 2048 .. 3075

So a thread needs PER_THREAD = 16 bits per tile. They are the low half of a 32-bit word; the high
half is how many of them are set, as a bfloat16, which the forward pass needs too. A byte per token
would be four times the traffic, and Triton would give it a layout of its own, in which the 16-byte
vectors of a thread's logits are no longer contiguous.

The vectors of a row start `prologue` elements in, at its first 16-byte boundary: with an odd
vocabulary that differs from row to row, so there is one table for each prologue < vec.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THREADS = 256  # per program
PER_THREAD = 16  # elements per thread and tile
TILE = THREADS * PER_THREAD


def pack_bits(mask: Tensor, vec: int) -> Tensor:
    """Pack a target mask into the table, int32 (vec, tiles, THREADS).

    Bit r * vec + v of word [prologue, tile, thread] is the mask of column
    prologue + ((tile * rounds + r) * THREADS + thread) * vec + v; 0 beyond the row's last vector.
    Bits 16 and up, as a bfloat16: the number of bits set below.

    Args:
        mask: bool (V,), True where a token is a target token.
        vec: elements in 16 bytes of logits, 4 or 8.
    """
    tiles = mask.numel() // TILE + 1  # the last one is partial, or empty
    padded = F.pad(mask, (0, tiles * TILE + vec - mask.numel()))
    shifted = padded.unfold(0, tiles * TILE, 1)[:vec]  # row h: the mask from column h on
    prologue = torch.arange(vec, device=mask.device)[:, None]
    length = (mask.numel() - prologue) // vec * vec
    in_vectors = torch.arange(tiles * TILE, device=mask.device) < length
    bits = (shifted & in_vectors).view(vec, tiles, PER_THREAD // vec, THREADS, vec).transpose(2, 3)
    bits = bits.reshape(vec, tiles, THREADS, PER_THREAD)
    weights = 1 << torch.arange(PER_THREAD, device=mask.device)
    words = (bits * weights).sum(-1, dtype=torch.int32)
    return words | bits.sum(-1, dtype=torch.float32).view(torch.int32)  # low half of these: zero
