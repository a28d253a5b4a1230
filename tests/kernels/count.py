"""Counts what the Triton kernels ask of a GPU, per logit. Needs no GPU.

    python -m tests.kernels.count

compiles the kernels for sm_90, executes their PTX (tests/kernels/ptx) on two contiguous rows of
50,257 logits, and prints for each launch, over all threads of the kernel and divided by the logits,

    instr     PTX instructions; the machine code of the main loop: python -m kernels.compile_report
    special   operations of the special-function unit: 2^x, log2, division
    read      bytes that threads load from global memory; wrote: that they store
    sectors   32-byte sectors that the requests of the warps touch: loads (ld), stores (st)
"""

from collections.abc import Iterator
from typing import Any

import torch

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div
from kernels.measure import format_table
from tests.kernels.ptx import driver

ROWS, VOCAB = 2, 50257
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASK = torch.arange(VOCAB) % 51 == 0
TARGETS = {
    "two-level, beta = 0": lambda t: TwoLevelTarget(MASK),
    "two-level, beta > 0": lambda t: TwoLevelTarget(MASK, 3.0, 0.5),
    "teacher": TeacherTarget,
    "teacher, tilt": lambda t: TeacherTarget(t, (TwoLevelTarget(MASK), 5.0)),
}
FORMS = {"target": "", "dtype": "", "kernel": "", "instr": ".1f", "special": ".2f", "read": ".2f"}
FORMS |= {"wrote": ".2f", "ld_sectors": ".3f", "st_sectors": ".3f"}


def launches(target: str) -> Iterator[dict[str, Any]]:
    """A row for each launch of a forward and backward pass, in each dtype."""
    generator = torch.Generator().manual_seed(0)
    for name, dtype in DTYPES.items():
        z, t = (torch.randn(ROWS, VOCAB, generator=generator).to(dtype) for _ in range(2))
        with driver.counted() as counted:
            fused_kl_div(z.requires_grad_(), TARGETS[target](t), impl="triton").backward()
        for kernel, counts in counted:
            loads, stores = counts.loads, counts.stores
            numbers = {"instr": counts.instructions, "special": counts.special}
            numbers |= {"read": loads.bytes, "wrote": stores.bytes}
            numbers |= {"ld_sectors": loads.sectors, "st_sectors": stores.sectors}
            per_logit = {key: number / (ROWS * VOCAB) for key, number in numbers.items()}
            yield {"target": target, "dtype": name, "kernel": kernel} | per_logit


if __name__ == "__main__":
    driver.install()
    print(format_table([row for target in TARGETS for row in launches(target)], FORMS))
