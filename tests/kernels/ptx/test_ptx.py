"""The PTX interpreter on PTX written by hand: what is computed, and what is refused."""

import re

import numpy as np
import pytest

from tests.kernels.ptx.counts import Counts
from tests.kernels.ptx.machine import launch
from tests.kernels.ptx.memory import AccessError, Memory, Region
from tests.kernels.ptx.parse import parse

MODULE = """
.visible .entry by_hand(
    .param .u64 .ptr .global .align 1 by_hand_param_0,
    .param .u64 by_hand_param_1
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<19>;
    ld.param.b64 %rd1, [by_hand_param_0];
    ld.param.b64 %rd2, [by_hand_param_1];
    mov.u32 %r1, %tid.x;        // thread
    mov.u32 %r2, %ctaid.x;      // program
    mad.lo.s32 %r3, %r2, 32, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd4, %rd1, %rd3;   // the thread's word of the first array
    add.s64 %rd5, %rd2, %rd3;   // and of the second
    CODE
    ret;
}
"""
NAN = float("nan")


def buffer(size, dtype="u4"):
    """Zeros that start on a boundary of 32 bytes."""
    raw = np.zeros(size * np.dtype(dtype).itemsize + 32, "u1")
    start = -raw.ctypes.data % 32
    return raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)


def run(code, first, second, programs=1, written=None, counts=None):
    """Execute the code, 32 threads in each program; arrays change in place. The bytes of `first`
    that are written may be given."""
    memory = Memory(
        [
            Region(first.ctypes.data, first.view("u1"), written),
            Region(second.ctypes.data, second.view("u1"), None),
        ]
    )
    addresses = (np.uint64(array.ctypes.data) for array in (first, second))
    kernel = parse(MODULE.replace("CODE", code))
    arguments = dict(zip(kernel.parameters, addresses, strict=True))
    launch(kernel, memory, programs, arguments, shared_bytes=128, counts=counts)


def bits(value):
    """A number as the constant that PTX writes, and a float as its bits."""
    return f"0f{np.float32(value).view('u4'):08X}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("add.f32 d, a, b", (1.5, 2.25), 3.75),
        ("sub.s32 d, a, b", (3, 5), -2),
        ("mul.f32 d, a, b", (3e38, 10.0), float("inf")),
        ("mul.lo.s32 d, a, b", (1 << 30, 6), -(1 << 31)),
        ("mad.lo.s32 d, a, b, 7", (-3, 5), -8),
        ("div.full.f32 d, a, b", (1.0, 3.0), 1 / 3),
        # (1 + e)^2 - (1 + 2 e) = e^2: a product rounded first would leave nothing.
        ("fma.rn.f32 d, a, a, b", (1 + 2.0**-12, -1 - 2.0**-11), 2.0**-24),
        ("fma.rn.ftz.f32 d, a, a, 0f00000000", (2.0**-70,), 0.0),
        ("fma.rn.f32 d, a, a, 0f00000000", (2.0**-70,), 2.0**-140),
        ("max.f32 d, a, b", (NAN, -1.0), -1.0),
        ("min.s32 d, a, b", (-4, 4), -4),
        ("neg.f32 d, a", (2.5,), -2.5),
        ("abs.f32 d, a", (-2.5,), 2.5),
        ("not.b32 d, a", (0,), -1),
        ("and.b32 d, a, b", (12, 10), 8),
        ("or.b32 d, a, b", (12, 10), 14),
        ("xor.b32 d, a, b", (12, 10), 6),
        ("shl.b32 d, a, b", (3, 31), -(1 << 31)),
        ("shl.b32 d, a, b", (3, 32), 0),
        ("shr.s32 d, a, b", (-8, 40), -1),
        ("shr.u32 d, a, b", (-8, 28), 15),
        ("shf.l.wrap.b32 d, a, b, 33", (1 << 31, 5), 11),
        ("shf.r.clamp.b32 d, a, b, 40", (1, 5), 5),
        ("shf.r.wrap.b32 d, a, b, 40", (256, 5), 1 | 5 << 24),
        ("bfe.u32 d, a, 8, 12", (0x12345678,), 0x456),
        ("ex2.approx.ftz.f32 d, a", (3.5,), 2**3.5),
        ("ex2.approx.ftz.f32 d, a", (-130.0,), 0.0),
        ("lg2.approx.ftz.f32 d, a", (8.0,), 3.0),
        ("setp.lt.s32 %p1, a, b; selp.b32 d, 1, 2, %p1", (-1, 1), 1),
        ("setp.lt.u32 %p1, a, b; selp.b32 d, 1, 2, %p1", (-1, 1), 2),
        ("setp.ne.f32 %p1, a, b; selp.b32 d, 1, 2, %p1", (NAN, NAN), 2),
        ("setp.neu.f32 %p1, a, b; selp.b32 d, 1, 2, %p1", (NAN, NAN), 1),
        ("setp.geu.f32 %p1, a, b; selp.b32 d, 1, 2, %p1", (1.0, 2.0), 2),
        ("setp.nan.f32 %p1, a, b; selp.b32 d, 1, 2, %p1", (1.0, NAN), 1),
        ("setp.eq.b32 %p1, a, b; not.pred %p2, %p1; selp.f32 d, a, b, %p2", (1.0, 2.0), 1.0),
        ("cvt.rn.f32.s32 d, a", (-7,), -7.0),
        ("cvt.s64.s32 %rd9, a; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 d, %rd9", (-7,), -1),
        ("cvt.u64.u32 %rd9, a; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 d, %rd9", (-7,), 0),
        ("mul.wide.s32 %rd9, a, b; shr.s64 %rd9, %rd9, 32; cvt.u32.u64 d, %rd9", (-1, 9), -1),
        ("cvt.f64.f32 %rd9, a; div.rn.f64 %rd9, %rd9, %rd9; cvt.rn.f32.f64 d, %rd9", (3.0,), 1.0),
        # Ties go to the even neighbour: below for 1 + 2^-8, above for 1 + 3 2^-8.
        ("cvt.rn.bf16.f32 %rs1, a; cvt.f32.bf16 d, %rs1", (1 + 2.0**-8,), 1.0),
        ("cvt.rn.bf16.f32 %rs1, a; cvt.f32.bf16 d, %rs1", (1 + 3 * 2.0**-8,), 1 + 2.0**-6),
        ("cvt.rn.bf16.f32 %rs1, a; cvt.f32.bf16 d, %rs1", (NAN,), NAN),
        ("cvt.rn.bf16x2.f32 d, a, b", (1.0, 2.0), 0x3F804000),
        ("cvt.rn.f16x2.f32 d, a, b", (1.0, 2.0), 0x3C004000),
        ("mov.b32 {%rs1, %rs2}, a; mov.b32 d, {%rs2, %rs1}", (0x12345678,), 0x56781234),
    ],
)
def test_an_instruction_computes_what_the_manual_says(code, inputs, expected):
    """d from the inputs a and b."""
    registers = {"a": "%r5", "b": "%r6", "d": "%r7"}
    code = re.sub(r"\b[abd]\b", lambda match: registers[match[0]], code)
    loads = [f"mov.b32 {registers[n]}, {bits(x)};" for n, x in zip("ab", inputs, strict=False)]
    out = buffer(32, "f4" if isinstance(expected, float) else "i4")
    run(f"{' '.join(loads)} {code}; st.global.b32 [%rd4], %r7;", out, buffer(1))
    np.testing.assert_allclose(out, expected, rtol=1e-7)


def test_an_instruction_that_is_not_known_is_refused():
    """By name, so that a kernel which needs it says what to add."""
    for code in (
        "mul.hi.u32 %r5, %r1, %r1;",
        "cvt.rzi.s32.f32 %r5, %r1;",
        "sin.approx.f32 %r5, %r1;",
    ):
        with pytest.raises(NotImplementedError, match=code.split()[0]):
            run(code, buffer(32), buffer(1))


def test_a_guard_leaves_the_other_threads_as_they_are():
    """Threads below 10 and from 20 on; where nothing was before, a float is NaN."""
    out = buffer(32, "f4")
    code = """
        setp.lt.u32 %p1, %r1, 10;
        setp.lt.u32 %p2, %r1, 20;
        @%p1 mov.b32 %r5, 0f3F800000;
        @!%p2 mov.b32 %r5, 0f40000000;
        st.global.b32 [%rd4], %r5;
    """
    run(code, out, buffer(1))
    np.testing.assert_array_equal(out, np.repeat(np.float32([1, NAN, 2]), [10, 10, 12]))


def test_programs_take_branches_of_their_own():
    """Program i goes round a loop i + 1 times, 400 of them."""
    out = buffer(400 * 32)
    code = """
        mov.b32 %r5, 0;
    $round:
        add.s32 %r5, %r5, 1;
        setp.le.u32 %p1, %r5, %r2;
        @%p1 bra $round;
        st.global.b32 [%rd4], %r5;
    """
    run(code, out, buffer(1), programs=400)
    np.testing.assert_array_equal(out, np.repeat(np.arange(400) + 1, 32))


def test_threads_of_one_program_may_not_part():
    """Triton guards instructions instead."""
    code = "setp.lt.u32 %p1, %r1, 10; @%p1 bra $end; add.s32 %r5, %r1, 1;\n$end:"
    with pytest.raises(NotImplementedError, match="part"):
        run(code, buffer(32), buffer(1))


def test_vectors_and_narrow_numbers_are_loaded_and_stored():
    """16 bytes at once, back in reverse order; bytes and halves, with sign and without."""
    source, out = buffer(128), buffer(128)
    source[:] = np.arange(128) - 64
    code = """
        shl.b64 %rd6, %rd3, 2;
        add.s64 %rd7, %rd1, %rd6;
        add.s64 %rd8, %rd2, %rd6;
        ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd7];
        st.global.v2.b32 [ %rd8 + 8 ], {%r5, %r4};
        st.global.v2.b32 [%rd8], {%r7, %r6};
    """
    run(code, source, out)
    np.testing.assert_array_equal(out.reshape(32, 4), source.reshape(32, 4)[:, ::-1])
    for kind, expected in (("s8", -64), ("u8", 192), ("s16", -64), ("u16", 65472)):
        run(f"ld.global.{kind} %r5, [%rd1]; st.global.b32 [%rd5], %r5;", source, out)
        assert out.view("i4")[0] == expected


def test_threads_exchange_values_by_shuffles_and_shared_memory():
    """The sum over a warp, in each of three programs; then the neighbour's value in reverse."""
    out = buffer(96)
    steps = [
        f"shfl.sync.bfly.b32 %r6, %r5, {1 << i}, 31, -1; add.s32 %r5, %r5, %r6;" for i in range(5)
    ]
    run("mov.b32 %r5, %r3;" + "".join(steps) + "st.global.b32 [%rd4], %r5;", out, buffer(1), 3)
    np.testing.assert_array_equal(out, np.repeat(np.arange(96).reshape(3, 32).sum(1), 32))
    code = """
        mov.b32 %r5, global_smem;
        shl.b32 %r6, %r1, 2;
        add.s32 %r6, %r5, %r6;
        st.shared.b32 [%r6], %r3;
        bar.sync 0;
        sub.s32 %r6, 124, %r6;
        ld.shared.b32 %r7, [%r6];
        st.global.b32 [%rd4], %r7;
    """
    run(code, out, buffer(1), 3)
    np.testing.assert_array_equal(out.reshape(3, 32), np.arange(96).reshape(3, 32)[:, ::-1])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.b32 %r5, [%rd4+4]", "out of bounds"),
        ("ld.global.b32 %r5, [%rd4+-4]", "out of bounds"),
        ("st.global.b32 [%rd4+4], %r1", "out of bounds"),
        ("st.global.b32 [%rd5], %r1", "out of bounds"),
        ("mov.b64 %rd6, 0; st.global.b32 [%rd6], %r1", "out of bounds"),
        ("ld.global.b32 %r5, [%rd1+2]", "misaligned"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd4]", "misaligned"),
        ("st.global.v4.b32 [%rd1+8], {%r1, %r1, %r1, %r1}", "misaligned"),
        ("ld.global.b32 %r5, [%rd1+120]", "nobody has written"),
        ("st.global.b16 [%rd1+120], %r2; ld.global.b32 %r5, [%rd1+120]", "nobody has written"),
        ("add.s32 %r5, %r6, 1", "%r6 is read before it is written"),
        ("mov.b32 %r5, global_smem; ld.shared.b32 %r6, [%r5]", "nobody has written"),
        ("mov.b32 %r5, global_smem; st.shared.b32 [%r5+128], %r1", "128 bytes of shared"),
    ],
)
def test_a_fault_is_found_at_the_access(code, message):
    """The first array has 32 words, of which the last two are unwritten, the second one word."""
    first, second = buffer(32), buffer(1)
    written = np.arange(128) < 120
    with pytest.raises(AccessError, match=message) as error:
        run(code + ";", first, second, written=written)
    assert code.split("; ")[-1] in str(error.value)
    assert not first.any()


def test_what_is_stored_may_be_loaded_and_what_is_guarded_may_lie_anywhere():
    """The same accesses as above, made right."""
    code = """
        st.global.b32 [%rd4], %r1;
        ld.global.b32 %r5, [%rd4];
        setp.lt.u32 %p1, %r1, 31;
        @%p1 ld.global.b32 %r5, [%rd4+4];
        setp.eq.b32 %p2, %r1, 0;
        @%p2 st.global.b32 [%rd5], %r5;
    """
    first, second = buffer(32), buffer(1)
    run(code, first, second, written=np.zeros(128, bool))
    np.testing.assert_array_equal(first, np.arange(32))
    assert second[0] == 1


@pytest.mark.parametrize(
    ("shift", "kind", "sectors"), [(2, "b32", 4), (4, "v4.b32", 16), (5, "b32", 32), (0, "b8", 1)]
)
def test_sectors_are_counted_for_each_request_of_a_warp(shift, kind, sectors):
    """Two programs of 32 threads at a stride of 2^shift bytes; then a load of 8 threads each."""
    registers = "{%r5, %r6, %r7, %r8}" if "v4" in kind else "%r5"
    code = f"""
        shl.b64 %rd6, %rd3, {shift};
        shr.u64 %rd6, %rd6, 2;
        add.s64 %rd6, %rd1, %rd6;
        ld.global.{kind} {registers}, [%rd6];
        setp.lt.u32 %p1, %r1, 8;
        @%p1 ld.global.{kind} {registers}, [%rd6];
    """
    counts = Counts()
    run(code, buffer(512), buffer(1), programs=2, counts=counts)
    width = {"b8": 1, "b32": 4, "v4.b32": 16}[kind]
    assert counts.loads.bytes == 2 * (32 + 8) * width
    assert counts.loads.sectors == 2 * (sectors + max(1, sectors // 4))
    assert counts.instructions == 2 * (32 * 14 + 8)
    assert (counts.special, counts.stores.bytes) == (0, 0)
