"""Compile the Triton kernels ahead of time and report registers, spills and instruction counts.

    python -m kernels.compile_report [--gpu sm_80 gfx942 ...] [--json]

No kernel runs, so this needs no GPU. A row per kernel, target and dtype:

    regs, spill       registers per thread, and bytes of them spilled to memory
    instr             machine instructions of the main loop per logit
    waits             round trips to DRAM per pass of the main loop (dram_waits)
    cross             shuffles and barriers in it
    ld128, ld_rest    its loads from global memory: of 128 bits, and narrower ones
    st128             its stores of 128 bits

The simple kernels are for comparison, in float32. "by element" is a teacher of another alignment
than the logits, here with a tilt, where it takes the most instructions. Padded, contiguous and
misaligned logits share one compiled variant, because the kernels are specialised on no argument.
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
from .measure import format_table

# From a T4 to a B200; an MI300X and an RX 7900.
GPU = Literal["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# As NVIDIA's or AMD's assembly spells them.
LOAD, STORE = r"(LDG|(global|buffer|flat)_load)", r"(STG|(global|buffer|flat)_store)"
WIDE, CROSS = r".*(\.128|dwordx4|_b128)", r"SHFL|BAR|REDUX|WARPSYNC|ds_|_dpp|s_barrier"
LABEL, JUMP = r"(\.L\w+):", r"(BRA|branch).*?(\.L\w+)"
INSTRUCTION = r"\s+(?:/\*\w+\*/\s+)?([@A-Z].*|(?:s|v|ds|global|buffer|flat)_.*)"


@dataclass(frozen=True)
class Options:
    """What to compile for, and how to print it."""

    gpu: tuple[GPU, ...] = ("sm_90",)  # compile for these architectures
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
    yield "backward", "two-level", triton_kl_div.backward_kernel, triton_launch.meta(dtype, gpu)
    if dtype == torch.float32:
        simple = {"BLOCK": triton_simple.BLOCK, "num_warps": 4}
        yield "forward", "two-level, simple", triton_simple.forward_kernel, simple
        yield "backward", "two-level, simple", triton_simple.backward_kernel, simple
    teachers = {"teacher": 16, "teacher, tilt": 16, "teacher, tilt, by element": dtype.itemsize}
    for target, t_align in teachers.items():
        constants = triton_launch.meta(dtype, gpu, TILT="tilt" in target, T_ALIGN=t_align)
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
    regs, spill = registers_and_spill(compiled)
    loop = max(loops(compiled), key=lambda lines: len(re.findall(LOAD, "\n".join(lines))))

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in loop)

    elements = bitmask.PER_THREAD
    if "simple" in target:
        elements = triton_simple.BLOCK // (compiled.metadata.num_warps * gpu.warp_size)
    row: dict[str, Any] = {"gpu": name, "kernel": kernel, "target": target, "dtype": dtype}
    row |= {"regs": regs, "spill": spill, "instr": round(len(loop) / elements, 2)}
    row |= {"waits": dram_waits(loop), "cross": count(CROSS)}
    row |= {"ld128": count(LOAD + WIDE), "ld_rest": count(f"{LOAD}(?!{WIDE})")}
    return row | {"st128": count(STORE + WIDE)}


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
            elif re.match(LOAD, opcode):
                under_way.add(0)
    return waits


def registers_and_spill(compiled: Any) -> tuple[int, int]:
    """Registers per thread, and bytes spilled: of stack and local memory, or of AMD's scratch."""
    names, text = ["vgpr_count", "private_segment_fixed_size"], compiled.asm.get("amdgcn")
    if text is None:
        names = ["REG", "STACK", "LOCAL"]
        text = _dump(compiled, "cuobjdump", "--dump-resource-usage")
    registers, *spill = (int(n) for name in names for n in re.findall(rf"\b{name}:\s*(\d+)", text))
    return registers, sum(spill)


def loops(compiled: Any) -> list[list[str]]:
    """The machine instructions of each loop: from a label to a jump back to it."""
    text = compiled.asm.get("amdgcn") or _dump(compiled, "nvdisasm", "--print-code")
    code: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in text.splitlines():
        if label := re.match(LABEL, line):
            labels[label[1]] = len(code)
        elif instruction := re.match(INSTRUCTION, line):
            code.append(instruction[1])
            jump = re.search(JUMP, line)
            if jump and jump[2] in labels:
                found.append(code[labels[jump[2]] :])
    return found


def _dump(compiled: Any, tool: str, option: str) -> str:
    """What a tool that comes with Triton prints of an NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    rows = []
    for name, dtype in itertools.product(options.gpu, DTYPES):
        print(f"... {name}, {dtype}", file=sys.stderr, flush=True)
        for variant in variants(gpu_target(name), DTYPES[dtype]):
            rows.append(report(name, dtype, *variant))
    forms = dict.fromkeys(rows[0], "") | {"instr": ".2f"}
    print(json.dumps(rows) if options.json else format_table(rows, forms))


if __name__ == "__main__":
    main()
