"""The arithmetic of PTX on NumPy arrays.

Every operation rounds once, to nearest. The approximate ones (ex2, lg2, div.full) are therefore
more exact than the hardware's, whose error is up to 2 units in the last place.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

TYPES = {
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # its bits: NumPy has no bfloat16
    "pred": np.dtype("?"),
}
U32, F32 = TYPES["u32"], TYPES["f32"]


class Operation(NamedTuple):
    """The types of an instruction's inputs, and the function of them that it computes."""

    inputs: tuple[np.dtype, ...]
    function: Callable[..., Array]


@cache
def decode(opcode: tuple[str, ...], arity: int) -> Operation:
    """The operation of an arithmetic opcode, such as fma.rn.ftz.f32, on this many inputs."""
    name, *modifiers, kind = opcode
    if name == "cvt":
        return _convert(modifiers, kind)
    if (name not in SAME_TYPE and name not in MIXED) or "hi" in modifiers:
        raise NotImplementedError(".".join(opcode))
    dtype = TYPES[kind]
    if name in MIXED:
        return MIXED[name](dtype, modifiers)
    function = SAME_TYPE[name]
    if "wide" in modifiers:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        inputs = (dtype, dtype, wide)[:arity]
        return Operation(inputs, lambda *x: function(*(a.astype(wide) for a in x)))
    return Operation((dtype,) * arity, _flushed(function) if "ftz" in modifiers else function)


def _flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with subnormal results set to zero."""

    def flushed(*inputs: Array) -> Array:
        result = function(*inputs)
        return np.where(np.abs(result) < np.finfo(F32).tiny, F32.type(0), result)

    return flushed


def _in_float64(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function computed in float64 and rounded to the type of its first input."""
    return lambda *inputs: function(*(x.astype("f8") for x in inputs)).astype(inputs[0].dtype)


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


SAME_TYPE: dict[str, Callable[..., Array]] = {  # all inputs have the type of the result
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": _multiply_add,
    "fma": _in_float64(_multiply_add),  # where the product of two float32 numbers is exact
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "ex2": _in_float64(np.exp2),
    "lg2": _in_float64(np.log2),
}


def _compare(dtype: np.dtype, modifiers: list[str]) -> Operation:
    """Ordered comparisons are false for NaN, unordered ones (ltu, ...) are true."""
    ordered: dict[str, Callable[[Array, Array], Array]] = {
        "eq": np.equal,
        "ne": lambda a, b: (a < b) | (a > b),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "num": lambda a, b: (a == a) & (b == b),
    }
    opposite = {"neu": "eq", "equ": "ne", "geu": "lt", "gtu": "le", "leu": "gt", "ltu": "ge"}
    opposite["nan"] = "num"
    (name,) = set(modifiers) - {"ftz"}
    if name in ordered:
        return Operation((dtype, dtype), ordered[name])
    return Operation((dtype, dtype), lambda a, b: ~ordered[opposite[name]](a, b))


def _select(dtype: np.dtype, _: list[str]) -> Operation:
    def select(a: Array, b: Array, predicate: Array) -> Array:
        return np.where(predicate, a, b)

    return Operation((dtype, dtype, TYPES["pred"]), select)


def _funnel_shift(_: np.dtype, modifiers: list[str]) -> Operation:
    """The upper (left) or lower word of the 64 bits high:low, shifted by 0 to 31 or 32 bits."""

    def shift(low: Array, high: Array, bits: Array) -> Array:
        both = high.astype("u8") << np.uint64(32) | low
        bits = (bits & 31 if "wrap" in modifiers else np.minimum(bits, 32)).astype("u8")
        shifted = both << bits >> np.uint64(32) if "l" in modifiers else both >> bits
        return shifted.astype(U32)

    return Operation((U32, U32, U32), shift)


def _extract(dtype: np.dtype, _: list[str]) -> Operation:
    """The bits at [start, start + length)."""
    if dtype != U32:
        raise NotImplementedError(f"bfe of {dtype}")
    return Operation((U32, U32, U32), lambda a, at, length: a >> at & ~(~U32.type(0) << length))


MIXED: dict[str, Callable[[np.dtype, list[str]], Operation]] = {
    "setp": _compare,
    "selp": _select,
    # By the width or more NumPy shifts as PTX does: all bits out.
    "shl": lambda t, _: Operation((t, U32), lambda a, bits: a << bits.astype(t)),
    "shr": lambda t, _: Operation((t, U32), lambda a, bits: a >> bits.astype(t)),
    "shf": _funnel_shift,
    "bfe": _extract,
}


def _convert(modifiers: list[str], source: str) -> Operation:
    """cvt.[rn.]TO.SOURCE; to a pair (bf16x2, f16x2) the first input is the upper half."""
    *rounding, to = modifiers
    if not set(rounding) <= {"rn"} or (source[0] == "f" and to[0] in "us"):
        raise NotImplementedError(f"cvt.{'.'.join(modifiers)}.{source}")
    if to.endswith("x2"):
        half = _convert([to.removesuffix("x2")], source).function
        both = lambda high, low: half(high).view("u2") * U32.type(1 << 16) + half(low).view("u2")  # noqa: E731
        return Operation((F32, F32), both)
    if to == "bf16":
        return Operation((F32,), _to_bfloat16)
    if source == "bf16":
        return Operation((TYPES["b16"],), lambda a: (a.astype(U32) << 16).view(F32))
    return Operation((TYPES[source],), lambda a: a.astype(TYPES[to]))


def _to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even; NaN to NaN."""
    bits = x.view(U32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype("u2")
