"""Registers, spills and main loops of the compiled kernels, and what a launch asks of a GPU's
memory: `python -m kernels.compile_report` and `python -m tests.kernels.count`.

Bounds hold for any compiler, those of speed from Triton 3.7 on; the numbers in docs/kernels.md are
those of the pinned Triton.
"""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

triton = pytest.importorskip("triton")

from kernels import bitmask, compile_report, triton_launch, triton_teacher  # noqa: E402
from kernels.compile_report import DTYPES, GPU, dram_waits, gpu_target  # noqa: E402
from tests.kernels import count  # noqa: E402
from tests.kernels.kl_cases import COMPILED_ON_CPU, NEEDS_3_7  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled then")
ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def variants(gpu):
    """Those of the report, and a teacher read by element without a tilt; the dtype before each."""
    for name, dtype in DTYPES.items():
        yield from ((name, *variant) for variant in compile_report.variants(gpu_target(gpu), dtype))
        constants = triton_launch.meta(dtype, gpu_target(gpu), TILT=False, T_ALIGN=dtype.itemsize)
        for kernel in ("forward", "backward"):
            function = getattr(triton_teacher, f"{kernel}_kernel")
            yield name, kernel, "teacher, by element", function, constants


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"])
def rows(request):
    """The report of a GPU."""
    return [compile_report.report(request.param, *variant) for variant in variants(request.param)]


@NEEDS_3_7
@pytest.mark.parametrize("gpu", get_args(GPU))
def test_no_kernel_spills_and_four_programs_fit_on_a_multiprocessor(gpu):
    """No bytes of a thread's stack, local or scratch memory. NVIDIA: 65,536 registers for four
    times 256 threads; for three toward a teacher, two if it is read element by element."""
    for dtype, kernel, target, function, constants in variants(gpu):
        compiled = compile_report.compile_kernel(gpu_target(gpu), function, dtype, constants)
        registers, spill = compile_report.registers_and_spill(compiled)
        assert spill == 0, (dtype, kernel, target)
        limit = 104 if "by element" in target else 80 if "teacher" in target else 64
        assert registers <= limit or gpu.startswith("gfx"), (dtype, kernel, target)


def test_the_scoreboard_counts_round_trips():
    """By hand: two loads under way together are one wait, a load behind arithmetic is another, and
    one whose result the next pass needs counts in that pass."""
    together = ["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E R8, desc[UR4][R2.64+0x10]"]
    assert dram_waits([*together, "FADD R0, R7, R0", "FADD R0, R8, R0"]) == 1
    apart = [together[0], "FADD R0, R7, R0", "@P0 LDG.E.64 R8, [R2]", "FADD R0, R0, R9.reuse"]
    assert dram_waits(apart) == 2
    assert dram_waits(["FADD R0, R4, R0", together[0]]) == 1
    assert dram_waits(["FADD R0, R4, R0", "STG.E [R2], R0"]) == 0
    amd = ["global_load_b128 v[2:5], v0, s[0:1]", "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)"]
    assert dram_waits([*amd, "buffer_load_dwordx4 v[2:5], v0", amd[1]]) == 2


@NEEDS_3_7
def test_main_loops_wait_seldom_and_read_and_write_by_128_bits(rows):
    """A warp waits for DRAM at most twice a tile, and no thread for another: no shuffle and no
    barrier, which the simple forward kernel has. A tile of logits is so many 16-byte vectors, as is
    one of a teacher's logits. The narrower loads are the words of the bitmask, and the elements of
    a teacher of another alignment. A compiler may unroll the loop to several tiles."""
    for r in rows:
        target, by_element = r["target"], "by element" in r["target"]
        assert r["waits"] >= 1, r
        if "simple" in target:
            assert r["cross"] > 0 or r["kernel"] == "backward", r
            continue
        assert r["waits"] <= 2, r
        assert r["cross"] == 0, r
        vectors = bitmask.PER_THREAD * DTYPES[r["dtype"]].itemsize // 16
        wide = vectors * (2 if "teacher" in target and not by_element else 1)
        narrow = bitmask.PER_THREAD * by_element + ("two-level" in target or "tilt" in target)
        tiles = max(1, r["ld128"] // wide)
        assert (r["ld128"], r["ld_rest"]) == (tiles * wide, tiles * narrow), r
        assert r["st128"] == (tiles * vectors if r["kernel"] == "backward" else 0), r


def test_rows_are_addressed_in_64_bits():
    """The last of 42,732 rows of 50,257 begins past 2^31 elements: the row's number times the
    stride, followed through the PTX."""
    for dtype, _, _, function, constants in variants("sm_90"):
        compiled = compile_report.compile_kernel(gpu_target("sm_90"), function, dtype, constants)
        ptx = compiled.asm["ptx"]
        (row,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)
        (wide,) = re.findall(rf"cvt\.[us]64\.[us]32\s+(%rd\d+), {row};", ptx)
        assert re.search(rf"(mul\.lo|mad\.lo)\.s64\s+%rd\d+, .*{wide}\b", ptx)


@pytest.mark.skipif(not PINNED or triton.__version__ != PINNED[1], reason="of another compiler")
@pytest.mark.parametrize("rows", ["sm_90"], indirect=True)
def test_the_table_in_the_docs_is_the_report(rows):
    """Its rows for float32 and bfloat16 on sm_90, number by number."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:forward|backward) \| .*) \|$", text, re.MULTILINE)
    columns = ("kernel", "target", "dtype", "regs", "spill", "instr", "waits", "cross")
    columns += ("ld128", "ld_rest", "st128")
    forms = {"instr": ".2f"}
    reported = [r for r in rows if r["dtype"] != "fp16" and r["target"] != "teacher, by element"]
    lines = [" | ".join(format(r[c], forms.get(c, "")) for c in columns) for r in reported]
    assert table == lines


def test_the_command_reports_every_variant_of_each_gpu_asked_for(monkeypatch, capsys):
    """Three variants toward a two-level target and six toward a teacher for each dtype, and the two
    simple kernels; here each row is a name."""
    monkeypatch.setattr(compile_report, "report", lambda *row: {"variant": str(row[:4])})
    for option in ("--json", ""):
        command = f"compile_report --gpu sm_80 gfx942 {option}"
        monkeypatch.setattr("sys.argv", command.split())
        compile_report.main()
    found, _, *table = capsys.readouterr().out.splitlines()
    assert [row["variant"] for row in json.loads(found)] == table
    assert len(set(table)) == 2 * (3 * 9 + 2)
    assert sum("gfx942" in line for line in table) == 3 * 9 + 2


@pytest.mark.parametrize(
    ("interpret", "message"), [("1", "TRITON_INTERPRET is set"), ("0", "--gpu: .* sm_75, ")]
)
def test_what_cannot_be_compiled_ends_in_one_line(interpret, message, monkeypatch):
    """Under TRITON_INTERPRET, and for no GPU: not a table without rows."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr("sys.argv", ["compile_report", "--gpu"])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        compile_report.main()


@pytest.mark.skipif(not COMPILED_ON_CPU, reason="for compiled kernels without a GPU")
@NEEDS_3_7
@pytest.mark.parametrize("target", count.TARGETS)
def test_logits_are_read_once_in_each_direction_and_by_whole_sectors(target):
    """Bytes per logit, and of a teacher's. The rest is two bits per logit of 13 whole tiles (0.27
    bytes), and up to six numbers per row that each of 256 threads reads; of the sectors that a
    request touches, 19 in 20 are used whole. And an exponential for each of these logits."""
    reads = 2 if "teacher" in target else 1
    rows = list(count.launches(target))
    assert [row["kernel"] for row in rows] == 2 * ["forward_kernel", "backward_kernel"]
    for row in rows:
        size = count.DTYPES[row["dtype"]].itemsize
        assert reads * size <= row["read"] <= reads * size + 0.45
        assert row["read"] / (32 * row["ld_sectors"]) > 0.95
        assert reads <= row["special"] < 1.16 * reads
        if row["kernel"] == "backward_kernel":
            assert row["wrote"] == size
            assert row["wrote"] / (32 * row["st_sectors"]) > 0.95
        else:
            assert row["wrote"] < 0.001
