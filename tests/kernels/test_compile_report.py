"""Registers, spills, widths and counts of the compiled kernels: `python -m kernels.compile_report`.

Bounds hold for any compiler, those of speed from Triton 3.7 on; the numbers in docs/kernels.md are
those of the pinned Triton.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from kernels import bitmask, compile_report  # noqa: E402
from tests.kernels.kl_cases import NEEDS_3_7  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
GPUS = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def run_report(interpret, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "kernels.compile_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows():
    result = run_report(False, "--json", "--gpu", *GPUS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def nvidia(rows):
    return [r for r in rows if r["gpu"].startswith("sm_")]


def fast(rows):
    return [r for r in rows if "simple" not in r["target"]]


def vectors(row):
    """16-byte vectors of logits per thread and tile."""
    return bitmask.PER_THREAD * SIZE[row["dtype"]] // 16


def test_every_gpu_dtype_kernel_and_target_is_reported(rows):
    """Three variants of kernels/triton_kl_div.py, the two simple ones, eight for teachers."""
    assert len(rows) == len(GPUS) * len(SIZE) * (3 + 2 + 8)
    assert {r["gpu"] for r in rows} == set(GPUS)


@NEEDS_3_7
def test_no_kernel_spills_a_register(rows):
    """No bytes of a thread's stack or local memory, by the assemblers' own count."""
    assert [r for r in rows if r["spill"]] == []


@NEEDS_3_7
def test_registers_leave_room_for_four_programs_on_a_multiprocessor(rows):
    """65,536 registers for four times 256 threads; for three toward a teacher, two if it is read
    element by element."""
    for r in nvidia(rows):
        by_element = "by element" in r["target"]
        assert r["regs"] <= (104 if by_element else 80 if "teacher" in r["target"] else 64), r


@NEEDS_3_7
def test_a_warp_waits_for_dram_at_most_twice_a_tile(rows):
    """By the scoreboard; most variants wait once."""
    assert [r for r in fast(rows) if r["waits"] > 2] == []
    assert all(r["waits"] >= 1 for r in rows)


def test_the_scoreboard_counts_round_trips():
    """By hand: two loads under way together are one wait, a load behind arithmetic is another, and
    one whose result the next pass needs counts in that pass."""
    together = ["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E R8, desc[UR4][R2.64+0x10]"]
    assert compile_report.dram_waits([*together, "FADD R0, R7, R0", "FADD R0, R8, R0"]) == 1
    apart = [together[0], "FADD R0, R7, R0", "@P0 LDG.E.64 R8, [R2]", "FADD R0, R0, R9.reuse"]
    assert compile_report.dram_waits(apart) == 2
    assert compile_report.dram_waits(["FADD R0, R4, R0", together[0]]) == 1
    assert compile_report.dram_waits(["FADD R0, R4, R0", "STG.E [R2], R0"]) == 0
    amd = ["global_load_b128 v[2:5], v0, s[0:1]", "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)"]
    assert compile_report.dram_waits([*amd, "buffer_load_dwordx4 v[2:5], v0", amd[1]]) == 2


@NEEDS_3_7
def test_main_loops_read_and_write_logits_by_128_bits(rows):
    """A tile of logits is so many 16-byte vectors, as is one of a teacher's logits. The narrower
    loads are the words of the bitmask, and the elements of a teacher of another alignment. A
    compiler may unroll the loop to several tiles."""
    for r in fast(rows):
        target, by_element = r["target"], "by element" in r["target"]
        wide = vectors(r) * (2 if "teacher" in target and not by_element else 1)
        narrow = bitmask.PER_THREAD * by_element + ("two-level" in target or "tilt" in target)
        tiles = max(1, r["ld128"] // wide)
        assert (r["ld128"], r["ld_rest"]) == (tiles * wide, tiles * narrow), r
        assert r["st128"] == (tiles * vectors(r) if r["kernel"] == "backward" else 0), r
        assert r["st_rest"] == 0, r


@NEEDS_3_7
def test_no_thread_waits_for_another_inside_a_main_loop(rows):
    """No shuffle and no barrier: each thread's maximum and sums stay in its registers. The simple
    forward kernel has both, which shows that they would be found."""
    assert [r for r in fast(rows) if r["cross"]] == []
    simple = [r for r in rows if r not in fast(rows) and r["kernel"] == "forward"]
    assert all(r["cross"] > 0 for r in simple)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled then")
@pytest.mark.parametrize("gpu", [name for name in GPUS if name.startswith("sm_")])
def test_rows_are_addressed_in_64_bits(gpu):
    """The last of 42,732 rows of 50,257 begins past 2^31 elements: the row's number times the
    stride, followed through the PTX."""
    target = compile_report.gpu_target(gpu)
    for name, dtype in compile_report.DTYPES.items():
        for *_, function, constants in compile_report.variants(target, dtype):
            compiled = compile_report.compile_kernel(target, function, name, constants)
            ptx = compiled.asm["ptx"]
            (row,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)
            (wide,) = re.findall(rf"cvt\.[us]64\.[us]32\s+(%rd\d+), {row};", ptx)
            assert re.search(rf"(mul\.lo|mad\.lo)\.s64\s+%rd\d+, .*{wide}\b", ptx)


# Machine instructions and special operations per logit on sm_90, at most: forward, backward.
# Another compiler than the pinned one, 3.8.0 for instance, may take half an instruction more.
LIMITS = {
    "two-level": {"fp32": (8.7, 7.0), "bf16": (10, 8.2), "special": (1.1, 1.0)},
    "teacher": {"fp32": (16, 12), "bf16": (18.5, 15), "special": (2.15, 2.0)},
}


@NEEDS_3_7
def test_a_logit_costs_so_many_instructions(rows):
    """One exponential for a two-level target, two for a teacher."""
    slack = 0 if PINNED and triton.__version__ == PINNED[1] else 0.5
    for r in fast(rows):
        limits = LIMITS[r["target"].split(",")[0]]
        if r["gpu"] == "sm_90" and r["dtype"] in limits:
            backward = r["kernel"] == "backward"
            assert r["special"] <= limits["special"][backward], r
            assert r["instr"] <= limits[r["dtype"]][backward] + slack, r


@pytest.mark.skipif(not PINNED or triton.__version__ != PINNED[1], reason="of another compiler")
def test_the_table_in_the_readme_is_the_report(rows):
    """Its rows for float32 and bfloat16 on sm_90, number by number."""
    readme = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:forward|backward) \| .*) \|$", readme, re.MULTILINE)
    columns = ("regs", "spill", "instr", "special", "waits")
    columns += ("ld128", "ld_rest", "st128", "st_rest")
    shown = {tuple(row.split(" | ")[:3]): row.split(" | ")[3:] for row in table}
    report = {
        (r["kernel"], r["target"], r["dtype"]): [
            format(r[c], ".2f" if isinstance(r[c], float) else "d") for c in columns
        ]
        for r in rows
        if r["gpu"] == "sm_90" and r["dtype"] != "fp16"
    }
    assert len(shown) == len(table)
    assert shown == report


def test_the_report_explains_itself_without_compiling():
    """--help prints the docstring, columns and all; interpreted, so that it could not compile."""
    result = run_report(True, "--help")
    assert result.returncode == 0
    assert "bytes of them spilled to memory" in result.stdout


def test_gpu_without_a_name_is_an_error_in_one_line():
    """Not a table without rows: the message lists the names."""
    result = run_report(False, "--gpu")
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --gpu: expected one or more of sm_75, ")


def test_the_report_refuses_to_run_interpreted():
    """Under TRITON_INTERPRET nothing is compiled, so there would be nothing to report."""
    result = run_report(interpret=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET" in result.stderr
