"""Counts what the Triton kernels ask of a GPU, per logit. Needs no GPU.

    python -m tests.kernels.count

compiles the kernels for sm_90, executes their PTX (tests/kernels/ptx) on two contiguous rows of
50,257 logits, and prints for each launch, over all threads of the kernel and divided by the logits,

    instr     PTX instructions; the machine code of the main loop: python -m kernels.compile_report
    special   operations of the special-function unit: 2^x, log2, division
    read      bytes that threads load from global memory; wrote: that they store
    sectors   32-byte sectors that the requests of the warps touch: loads, stores
"""

from collections.abc import Iterator

import torch

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div
from kernels.target import Target
from tests.kernels.ptx import driver
from tests.kernels.ptx.counts import Counts

ROWS, VOCAB = 2, 50257
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(dtype: torch.dtype) -> dict[str, tuple[Target, str]]:
    """Target and path by the name that the table shows; a teacher's logits have this dtype."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(VOCAB) % 51 == 0
    t = torch.randn(ROWS, VOCAB, generator=generator)
    t = t.to(dtype)
    return {
        "two-level, beta = 0": (TwoLevelTarget(mask), "triton"),
        "two-level, beta > 0": (TwoLevelTarget(mask, 3.0, 0.5), "triton"),
        "teacher": (TeacherTarget(t), "triton"),
        "teacher, tilt": (TeacherTarget(t, (TwoLevelTarget(mask), 5.0)), "triton"),
        "simple kernels": (TwoLevelTarget(mask), "triton-simple"),
    }


def launches() -> Iterator[tuple[str, str, str, Counts]]:
    """Case, dtype, kernel and counts of each launch of a forward and backward pass."""
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
    tables = {name: cases(dtype) for name, dtype in DTYPES.items()}
    for name in tables["fp32"]:
        for dtype, table in tables.items():
            target, impl = table[name]
            z = logits.to(DTYPES[dtype]).requires_grad_()
            with driver.counted() as counted:
                fused_kl_div(z, target, impl=impl).backward()
            yield from ((name, dtype, kernel, counts) for kernel, counts in counted)


def main() -> None:
    """Print the table."""
    driver.install()
    print("target              dtype kernel           instr special   read  wrote  sectors")
    for target, dtype, kernel, counts in launches():
        loads, stores = counts.loads, counts.stores
        numbers = (counts.instructions, counts.special, loads.bytes, stores.bytes)
        numbers += (loads.sectors, stores.sectors)
        forms = ("5.1f", "7.2f", "6.2f", "6.2f", "5.3f", "5.3f")
        cells = (format(n / (ROWS * VOCAB), form) for n, form in zip(numbers, forms, strict=True))
        print(f"{target:19} {dtype:5} {kernel:16}", *cells)


if __name__ == "__main__":
    main()
