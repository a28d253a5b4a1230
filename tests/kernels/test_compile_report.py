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

ROOT = Path(__file__).parents[2]
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
GPUS = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
NEEDS_3_7 = pytest.mark.skipif(
    [int(n) for n in triton.__version__.split(".")[:2]] < [3, 7],
    reason="Triton 3.5 shuffles inside the loop of the forward kernel: right, but slower",
)


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


def vectors(row):
    """16-byte vectors of logits per thread and tile."""
    return bitmask.PER_THREAD * SIZE[row["dtype"]] // 16


def test_every_gpu_dtype_kernel_and_target_is_reported(rows):
    """Three kinds of target, one of them with and without beta forward, at both alignments."""
    assert len(rows) == len(GPUS) * 3 * 7
    assert {r["gpu"] for r in rows} == set(GPUS)


def test_no_kernel_spills_a_register(rows):
    """No bytes of a thread's stack or local memory, by the assemblers' own count."""
    assert [r for r in rows if r["spill"]] == []


def test_registers_leave_room_for_four_programs_on_a_multiprocessor(rows):
    """65,536 registers for four times 256 threads."""
    assert [r for r in nvidia(rows) if r["registers"] > 64] == []


@NEEDS_3_7
def test_a_warp_waits_for_dram_at_most_twice_a_tile(rows):
    """By the scoreboard; most variants wait once."""
    assert [r for r in nvidia(rows) if r["waits"] > 2] == []
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
    """A tile of logits, and of a float32 P, is so many 16-byte vectors. The narrower loads are the
    words of the bitmask, and the elements of a dense P of another alignment. A compiler may
    unroll the loop to several tiles."""
    for r in rows:
        backward, dense = r["kernel"] == "backward", r["target"] == "dense"
        unaligned = r["target"] == "dense, unaligned"
        wide = vectors(r) + (bitmask.PER_THREAD * 4 // 16 if dense else 0)
        tiles = max(1, r["ld128"] // wide)
        assert r["ld128"] == tiles * wide, r
        assert r["ld_narrow"] == tiles * (bitmask.PER_THREAD if unaligned else 0 if dense else 1), r
        assert r["st128"] == tiles * (vectors(r) if backward else 0), r
        assert r["st_narrow"] == 0, r


@NEEDS_3_7
def test_no_thread_waits_for_another_inside_a_main_loop(rows):
    """No shuffle and no barrier: each thread's maximum and sums stay in its registers."""
    assert [r for r in rows if r["cross_thread"]] == []


def test_rows_are_addressed_in_64_bits(rows):
    """42,731 rows of 50,257 are more than 2^31 elements: the row's number times the stride."""
    assert {r["row_offset_bits"] for r in nvidia(rows)} == {64}


@NEEDS_3_7
def test_a_logit_costs_so_many_instructions(rows):
    """Machine instructions of the main loops on sm_90: one exponential and ten in all for a
    two-level target, one logarithm more and fourteen for a dense one."""
    for r in rows:
        if r["gpu"] == "sm_90":
            dense = r["target"].startswith("dense")
            assert r["special"] <= (2.1 if dense and r["kernel"] == "forward" else 1.1), r
            assert r["loop_per_element"] <= (14 if dense else 10.5), r


@pytest.mark.skipif(not PINNED or triton.__version__ != PINNED[1], reason="of another compiler")
def test_the_table_in_the_readme_is_the_report(rows):
    """Its rows for float32 and bfloat16 on sm_90, number by number."""
    readme = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:forward|backward) \| .*) \|$", readme, re.MULTILINE)
    columns = ("registers", "spill", "loop_per_element", "special", "waits")
    columns += ("ld128", "ld_narrow", "st128", "st_narrow")
    shown = {tuple(row.split(" | ")[:3]): row.split(" | ")[3:] for row in table}
    expected = {
        (r["kernel"], r["target"], r["dtype"]): [
            format(r[c], ".2f" if isinstance(r[c], float) else "d") for c in columns
        ]
        for r in rows
        if r["gpu"] == "sm_90" and r["dtype"] != "fp16"
    }
    assert shown == expected


def test_the_report_explains_itself_without_compiling():
    """--help prints the docstring, columns and all; interpreted, so that it could not compile."""
    result = run_report(True, "--help")
    assert result.returncode == 0
    assert "bytes of them spilled to memory" in result.stdout


def test_the_report_refuses_to_run_interpreted():
    """Under TRITON_INTERPRET nothing is compiled, so there would be nothing to report."""
    result = run_report(interpret=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET" in result.stderr
