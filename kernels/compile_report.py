"""Compile the Triton kernels ahead of time and report registers, spills and instruction counts.

    python -m kernels.compile_report [--gpu sm_80 gfx942 ...] [--json]

No kernel runs, so this needs no GPU. A row per kernel, target and dtype:

    regs, spill       registers per thread, and bytes of them spilled to memory
    instr             machine instructions of the main loop per logit
    special           of these, operations of the special-function unit (2^x, log2)
    waits             round trips to DRAM per pass of the main loop (dram_waits)
    cross             shuffles and barriers in the main loop
    ld128, ld_rest    loads from global memory in the main loop: of 128 bits, and narrower ones
    st128, st_rest    stores likewise

Padded, contiguous and misaligned logits share one compiled variant, because the kernels are
specialised on no argument.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import tyro

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    sys.exit("error: Triton is not installed; run: pip install triton")

from . import bitmask, triton_kl_div, triton_launch, triton_simple, triton_teacher
from .measure import aligned

# From a T4 to a B200; an MI300X and an RX 7900.
GPU = Literal["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What to compile for, and how to print it."""

    gpu: tuple[GPU, ...] = ("sm_90",)  # one or more architectures
    json: bool = False  # print the table in one line of JSON


def gpu_target(name: GPU) -> GPUTarget:
    """The GPU as Triton's compiler takes it, with the threads of its warps."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name == "gfx942" else 32)


def variants(gpu: GPUTarget, dtype: torch.dtype) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Kernel, target, function, and its constants and options, as the launchers have them."""
    for beta in (False, True):
        constants = triton_launch.meta(dtype, gpu, BETA=beta)
        yield "forward", "two-level" + ", beta" * beta, triton_kl_div.forward_kernel, constants
    constants = triton_launch.meta(dtype, gpu)
    yield "backward", "two-level", triton_kl_div.backward_kernel, constants
    simple = {"BLOCK": triton_simple.BLOCK, "num_warps": 4}
    yield "forward", "two-level, simple", triton_simple.forward_kernel, simple
    yield "backward", "two-level, simple", triton_simple.backward_kernel, simple
    for tilt, t_align in itertools.product((False, True), (16, dtype.itemsize)):
        target = "teacher" + ", tilt" * tilt + ", by element" * (t_align < 16)
        constants = triton_launch.meta(dtype, gpu, TILT=tilt, T_ALIGN=t_align)
        yield "forward", target, triton_teacher.forward_kernel, constants
        yield "backward", target, triton_teacher.backward_kernel, constants


def compile_kernel(gpu: GPUTarget, function: Any, dtype: str, constants: dict[str, Any]) -> Any:
    """Compile the kernel as the launcher would have it: same types, constants and options."""
    names = [p.name for p in function.params]
    options = {k: v for k, v in constants.items() if k not in names}
    constants = {k: v for k, v in constants.items() if k in names}
    types = dict.fromkeys(("logits_ptr", "out_ptr", "teacher_ptr"), f"*{dtype}")
    types |= {"mask_ptr": "*u8", "bits_ptr": "*i32", "levels_ptr": "*fp64", "strength_ptr": "*fp64"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {p.name: types.get(p.name, p.annotation_type or "*fp32") for p in function.params}
    source = ASTSource(function, signature, constexprs=constants)
    return triton.compile(source, target=gpu, options=options)


def report(
    name: GPU, dtype: str, kernel: str, target: str, function: Any, constants: dict[str, Any]
) -> dict[str, Any]:
    """Compile one variant and read its numbers off the machine code, counts off its main loop."""
    gpu = gpu_target(name)
    compiled = compile_kernel(gpu, function, dtype, constants)
    if gpu.backend == "cuda":
        registers, spill, loops = _nvidia(compiled.asm["cubin"])
        special, cross = r"MUFU", r"SHFL|BAR|REDUX|WARPSYNC"
        load, store = r"LDG", r"STG"
    else:
        registers, spill, loops = _amd(compiled.asm["amdgcn"])
        special, cross = r"v_(exp|log)_", r"ds_|_dpp|s_barrier"
        load, store = r"(global|buffer|flat)_load", r"(global|buffer|flat)_store"
    loop = max(loops, key=lambda lines: sum(bool(re.search(load, line)) for line in lines))
    wide = [line for line in loop if re.search(r"\.128|dwordx4|_b128", line)]

    def count(pattern: str, lines: list[str] = loop) -> int:
        return sum(bool(re.search(pattern, line)) for line in lines)

    elements = bitmask.PER_THREAD
    if "simple" in target:
        elements = triton_simple.BLOCK // (compiled.metadata.num_warps * gpu.warp_size)
    return {
        "gpu": name,
        "kernel": kernel,
        "target": target,
        "dtype": dtype,
        "regs": registers,
        "spill": spill,
        "instr": round(len(loop) / elements, 2),
        "special": round(count(special) / elements, 2),
        "waits": dram_waits(loop),
        "cross": count(cross),
        "ld128": count(load, wide),
        "ld_rest": count(load) - count(load, wide),
        "st128": count(store, wide),
        "st_rest": count(store) - count(store, wide),
    }


def dram_waits(loop: list[str]) -> int:
    """How often a warp waits for DRAM in one pass of a loop of machine code.

    A scoreboard: a warp issues in order, and stops at the first instruction that needs the result
    of a load (AMD: at an s_waitcnt). Until then all loads that it has issued are under way at the
    same time, so together they cost one wait; a load further down costs another.
    """
    under_way: set[int] = set()  # registers that loads will fill; AMD: 0 for any of them
    for _ in range(2):  # the second pass finds what the first left under way
        waits = 0
        for line in loop:
            opcode, _, operands = re.sub(r"^@\S+ |\.reuse", "", line).partition(" ")  # @: predicate
            registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
            filled = registers[:1] if opcode.startswith("LDG") else []
            if under_way & set(registers[len(filled) :]) or (under_way and "vmcnt" in operands):
                waits += 1
                under_way.clear()
            if filled:
                width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
                under_way |= {filled[0] + i for i in range(width)}
            elif re.match(r"(global|buffer|flat)_load", opcode):
                under_way.add(0)
    return waits


def _nvidia(cubin: bytes) -> tuple[int, int, list[list[str]]]:
    """Registers, spilled bytes, and the instructions of each loop, by Triton's cuobjdump."""
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
    return int(numbers["REG"]), spill, loops


def _amd(assembly: str) -> tuple[int, int, list[list[str]]]:
    """The same of an AMD kernel, whose spills are its scratch memory."""
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
    return int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"]), loops


def main() -> None:
    """The command line: compile every kernel for each GPU and print the table."""
    options = tyro.cli(
        Options,
        prog="python -m kernels.compile_report",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if triton.knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    if not options.gpu:
        sys.exit(f"error: --gpu: expected one or more of {', '.join(get_args(GPU))}; got none")
    rows = [
        report(name, dtype, *variant)
        for name in options.gpu
        for dtype in DTYPES
        for variant in variants(gpu_target(name), DTYPES[dtype])
    ]
    if options.json:
        print(json.dumps(rows))
        return
    forms = {"instr": ".2f", "special": ".2f"}
    print(aligned({k: [format(row[k], forms.get(k, "")) for row in rows] for k in rows[0]}))


if __name__ == "__main__":
    main()
