"""What the compilers make of the Triton kernels: read off `python -m kernels.compile_report`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
SLOTS = 32  # elements of logits that a lane owns in a tile


def run_report(interpret, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "kernels.compile_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows():
    result = run_report(interpret=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_target_dtype_and_kind_is_reported(rows):
    """Three kinds of target forward, two backward, three dtypes, four GPUs."""
    assert len(rows) == 4 * 3 * (3 + 2)
    assert {r["gpu"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_no_kernel_spills_a_register(rows):
    """No bytes of a thread's stack or local memory, by the assemblers' own count."""
    assert [r for r in rows if r["spill"]] == []


def test_main_loops_read_and_write_logits_by_128_bits(rows):
    """SLOTS elements of logits, and of a float32 P, are so many 16-byte vectors. The narrower loads
    are the membership of a two-level target: a word, and in forward its number of bits."""
    for r in rows:
        dense = r["target"] == "dense"
        backward = r["kernel"] == "backward"
        vectors = SLOTS * SIZE[r["dtype"]] // 16
        assert r["ld128"] == vectors + (SLOTS * 4 // 16 if dense else 0), r
        assert r["ld_narrow"] == (0 if dense else 1 if backward else 2), r
        assert r["st128"] == (vectors if backward else 0), r
        assert r["st_narrow"] == 0, r


def test_no_lane_waits_for_another_inside_a_main_loop(rows):
    """No shuffle and no barrier: each lane's maximum and sums stay in its registers."""
    assert [r for r in rows if r["cross_lane"]] == []


def test_rows_are_addressed_in_64_bits(rows):
    """42,731 rows of 50,257 are more than 2^31 elements: the row's number times the stride."""
    assert {r["row_offset_bits"] for r in rows if r["gpu"].startswith("sm_")} == {64}


def test_an_element_costs_one_exponential_and_ten_instructions_at_most(rows):
    """Machine instructions of the two-level main loops on sm_90, counted in the report."""
    for r in rows:
        if r["gpu"] == "sm_90" and r["target"] != "dense":
            assert r["special"] <= 1.1, r
            assert r["loop_per_element"] <= 10, r


def test_the_table_in_the_readme_is_the_report(rows):
    """Its rows for float32 and bfloat16 on sm_90, number by number."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:forward|backward) \| .*) \|$", readme, re.MULTILINE)
    columns = ("registers", "spill", "loop_per_element", "special", "cross_lane")
    columns += ("ld128", "ld_narrow", "st128", "st_narrow")
    shown = {tuple(row.split(" | ")[:3]): row.split(" | ")[3:] for row in table}
    assert len(shown) == len(table) == 10
    for r in rows:
        key = r["kernel"], r["target"], r["dtype"]
        if r["gpu"] == "sm_90" and r["dtype"] != "fp16":
            values = [format(r[c], ".2f" if isinstance(r[c], float) else "d") for c in columns]
            assert shown[key] == values, key


def test_the_report_explains_itself_without_compiling():
    """--help prints the docstring, columns and all; interpreted, so that it could not compile."""
    result = run_report(True, "--help")
    assert result.returncode == 0
    assert "bytes spilled to memory" in result.stdout


def test_the_report_refuses_to_run_interpreted():
    """Under TRITON_INTERPRET nothing is compiled, so there would be nothing to report."""
    result = run_report(interpret=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET" in result.stderr
