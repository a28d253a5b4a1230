"""What the compilers make of the Triton kernels, for GPUs that need not be here.

    python -m kernels.compile_report

compiles both kernels for sm_80, sm_90, sm_100 and gfx942, for each dtype and each kind of target,
and prints a row for each; the last line is the table in JSON. Nothing runs, so no GPU is needed.

    registers, spill, shared   a thread's registers, its bytes spilled to memory; shared bytes
    code                       machine instructions of the whole kernel
    loop/elem                  machine instructions of the main loop, an element of logits
    special                    of these, operations of the special-function unit (2^x, log2)
    cross                      of these, shuffles between lanes and barriers
    ld128 ld< st128 st<        main loop's global accesses of 128 bits, and narrower ones

There is no column for the layout of the rows: the kernels are specialised on no argument, so one
compiled variant serves padded, contiguous and misaligned rows. The narrower loads, one or two a
tile, are the membership of a two-level target. A dense P is shown in float32 and in step with the
logits; another dtype, or one out of step, is another variant.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import membership, triton_kl_div, triton_launch

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"forward": ("beta=0", "beta>0", "dense"), "backward": ("two-level", "dense")}


@dataclass
class Row:
    """One compiled kernel: bytes of spills, shared memory and code, counts of its main loop."""

    gpu: str
    kernel: str
    dtype: str
    target: str
    registers: int
    spill: int
    shared: int
    code: int
    loop_per_element: float
    special: float
    cross_lane: int
    ld128: int
    ld_narrow: int
    st128: int
    st_narrow: int
    row_offset_bits: int | None  # of the row's number times the stride; None where not PTX


def compile_kernel(gpu: GPUTarget, kernel: str, dtype: str, target: str) -> Any:
    """The kernel as the launcher would have it compiled: same types, constants and warps."""
    dense = target == "dense"
    constants: dict[str, Any] = triton_launch.meta(
        DTYPES[dtype], dense=dense, warp_size=gpu.warp_size
    )
    num_warps = constants.pop("num_warps")
    if kernel == "forward":
        constants["BETA"] = target == "beta>0"
    pointers = {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    if not dense:
        pointers |= {"target_ptr": "*i32", "members_ptr": "*u8"}
    function = getattr(triton_kl_div, f"{kernel}_kernel")
    signature = {
        p.name: "constexpr"
        if p.is_constexpr
        else p.annotation_type or pointers.get(p.name, "*fp32")
        for p in function.params
    }
    source = ASTSource(function, signature, constexprs=constants)
    return triton.compile(source, target=gpu, options={"num_warps": num_warps})


def report(gpu: GPUTarget, kernel: str, dtype: str, target: str) -> Row:
    """Compile one variant and read its numbers off the machine code."""
    compiled = compile_kernel(gpu, kernel, dtype, target)
    if gpu.backend == "cuda":
        usage, code, loops = _nvidia(compiled.asm["cubin"])
        wide, special = r"\.128", r"MUFU"
        load, store = r"LDG", r"STG"
        cross_lane = r"SHFL|BAR|REDUX|WARPSYNC"
    else:
        usage, code, loops = _amd(compiled.asm["amdgcn"])
        wide, special = r"dwordx4", r"v_(exp|log)_"
        load, store = r"(global|buffer|flat)_load", r"(global|buffer|flat)_store"
        cross_lane = r"ds_|_dpp|s_barrier"

    def count(*patterns: str) -> int:
        return sum(all(re.search(p, line) for p in patterns) for line in loop)

    loop = max(loops, key=lambda lines: sum(bool(re.search(load, line)) for line in lines))
    elements = membership.SLOTS * round(count(load, wide) / _vectors(dtype, target)) or 1
    return Row(
        gpu=f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch),
        kernel=kernel,
        dtype=dtype,
        target=target,
        registers=usage[0],
        spill=usage[1],
        shared=compiled.metadata.shared,
        code=code,
        loop_per_element=round(len(loop) / elements, 2),
        special=round(count(special) / elements, 2),
        cross_lane=count(cross_lane),
        ld128=count(load, wide),
        ld_narrow=count(load) - count(load, wide),
        st128=count(store, wide),
        st_narrow=count(store) - count(store, wide),
        row_offset_bits=_row_offset_bits(compiled.asm["ptx"]) if gpu.backend == "cuda" else None,
    )


def _vectors(dtype: str, target: str) -> int:
    """16-byte vectors that a lane loads in one tile."""
    size = DTYPES[dtype].itemsize + (4 if target == "dense" else 0)
    return membership.SLOTS * size // 16


def _nvidia(cubin: bytes) -> tuple[tuple[int, int], int, list[list[str]]]:
    """(registers, spill bytes), number of instructions, and the loops, by Triton's cuobjdump."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", sass))
    spill = int(numbers["STACK"]) + int(numbers["LOCAL"])
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    code = [text for _, text in lines]
    jumps = [(i, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for i, text in enumerate(code)]
    starts = [(place[int(jump.group(1), 16)], end) for end, jump in jumps if jump]
    # The last instruction of every kernel is a jump to itself.
    loops = [code[start : end + 1] for start, end in starts if start < end]
    return (int(numbers["REG"]), spill), len(code), loops


def _amd(assembly: str) -> tuple[tuple[int, int], int, list[list[str]]]:
    """The same of an AMD kernel: (vector registers, bytes of scratch memory), code, loops."""
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    code: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.split("s_endpgm")[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(code)
        elif re.match(r"\s+(s|v|ds|global|buffer|flat)_", line):
            code.append(line.strip())
            jump = re.search(r"branch\w*\s+(\.LBB\w+)", line)
            if jump and jump.group(1) in labels:
                loops.append(code[labels[jump.group(1)] :])
    usage = int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"])
    return usage, len(code), loops


def _row_offset_bits(ptx: str) -> int:
    """Width of the product of the program's number and a stride, followed through the PTX."""
    row = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)
    assert row, "the kernel does not ask which row it is"
    wide = re.search(rf"cvt\.[us]64\.[us]32\s+(%rd\d+), {row.group(1)};", ptx)
    if wide and re.search(rf"(mul\.lo|mad\.lo)\.s64\s+%rd\d+, .*{wide.group(1)}\b", ptx):
        return 64
    return 32


def main(arguments: list[str] | None = None) -> None:
    """The command line: compile every kernel for every GPU and print the table."""
    argparse.ArgumentParser(
        prog="python -m kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    rows = [
        report(gpu, kernel, dtype, target)
        for gpu in TARGETS
        for kernel, targets in KINDS.items()
        for dtype in DTYPES
        for target in targets
    ]
    print(
        "gpu     kernel   dtype target    registers spill shared code loop/elem special"
        " cross  ld128 ld<  st128 st<"
    )
    for r in rows:
        print(
            f"{r.gpu:7} {r.kernel:8} {r.dtype:5} {r.target:9} {r.registers:9} {r.spill:5} "
            f"{r.shared:6} {r.code:4} {r.loop_per_element:9.2f} {r.special:7.2f} "
            f"{r.cross_lane:5}  {r.ld128:5} {r.ld_narrow:3}  {r.st128:5} {r.st_narrow:3}"
        )
    print(json.dumps([asdict(r) for r in rows]))


if __name__ == "__main__":
    main()
