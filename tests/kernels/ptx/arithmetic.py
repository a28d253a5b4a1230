"""The arithmetic of PTX on NumPy arrays, as far as the kernels use it.

Every operation rounds once, to nearest. The approximate ones (ex2, div.full) are therefore more
exact than the hardware's, whose error is up to 2 units in the last place.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

TYPES = {
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # its bits: NumPy has no bfloat16
    "pred": np.dtype("?"),
}
U32, F32 = TYPES["u32"], TYPES["f32"]
Operation = tuple[tuple[np.dtype, ...], Callable[..., Array]]  # types of the inputs, function


@cache
def decode(opcode: tuple[str, ...], arity: int) -> Operation:
    """The operation of an arithmetic opcode, such as fma.rn.ftz.f32, on this many inputs."""
    name, *modifiers, kind = opcode
    if name == "cvt":
        return _convert(modifiers, kind)
    dtype = TYPES[kind]
    if name == "setp" and set(modifiers) <= COMPARISONS.keys():
        return (dtype, dtype), COMPARISONS[modifiers[0]]
    if name == "selp":
        return (dtype, dtype, TYPES["pred"]), lambda a, b, predicate: np.where(predicate, a, b)
    if name in SHIFTS:  # by the width or more NumPy shifts as PTX does: all bits out
        return (dtype, U32), lambda a, bits: SHIFTS[name](a, bits.astype(dtype))
    if name not in SAME_TYPE or not set(modifiers) <= MODIFIERS:
        raise NotImplementedError(".".join(opcode))
    function = SAME_TYPE[name]
    if "wide" in modifiers:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return (dtype, dtype, wide)[:arity], lambda *x: function(*(a.astype(wide) for a in x))
    return (dtype,) * arity, _flushed(function) if "ftz" in modifiers else function


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


MODIFIERS = {"lo", "wide", "rn", "full", "approx", "ftz"}
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
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "ex2": _in_float64(np.exp2),
}
SHIFTS: dict[str, Callable[..., Array]] = {"shl": np.left_shift, "shr": np.right_shift}
COMPARISONS: dict[str, Callable[..., Array]] = {  # false for NaN, but for neu
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "neu": np.not_equal,
    "lt": np.less,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b),
}


def _convert(modifiers: list[str], source: str) -> Operation:
    """cvt.[rn.]TO.SOURCE; to a pair (bf16x2, f16x2) the first input is the upper half."""
    *rounding, to = modifiers
    if not set(rounding) <= {"rn"} or (source[0] == "f" and to[0] in "us"):
        raise NotImplementedError(f"cvt.{'.'.join(modifiers)}.{source}")
    if to.endswith("x2"):
        half = _convert([to.removesuffix("x2")], source)[1]
        both = lambda high, low: half(high).view("u2") * U32.type(1 << 16) + half(low).view("u2")  # noqa: E731
        return (F32, F32), both
    if to == "bf16":
        return (F32,), _to_bfloat16
    if source == "bf16":
        return (TYPES["b16"],), lambda a: (a.astype(U32) << 16).view(F32)
    return (TYPES[source],), lambda a: a.astype(TYPES[to])


def _to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even; NaN to NaN."""
    bits = x.view(U32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype("u2")
