"""Executes PTX: many programs of a launch at once, all their threads in lockstep, so that a missing
barrier does not show.

A register is an array that broadcasts to (programs, threads): (1, 1) where all share its value,
(programs, 1) where the threads of each program do. A branch is taken by whole programs; where
programs part, the machine splits in two, and each runs to its end.
"""

import copy
import re
from collections.abc import Mapping
from functools import cache

import numpy as np

from .arithmetic import TYPES, Array, decode
from .counts import Counts, Traffic
from .memory import AccessError, Memory, Region
from .parse import Instruction, Kernel

THREADS_AT_ONCE = 8192  # enough to hide what a NumPy call costs, few enough for the cache
U32 = TYPES["u32"]
Guard = Array | None  # the threads that take part; None: all


def launch(
    kernel: Kernel,
    memory: Memory,
    programs: int,
    arguments: Mapping[str, np.generic],
    shared_bytes: int = 0,
    counts: Counts | None = None,
) -> None:
    """Run a grid of this many programs, with a value for each of the kernel's parameters.

    Raises:
        AccessError: an access that memory.py refuses, or a register read before it is written.
        NotImplementedError: an instruction that no kernel has needed so far.
    """
    size = max(1, THREADS_AT_ONCE // kernel.threads)
    for start in range(0, programs, size):
        some = range(start, min(start + size, programs))
        machines = [Machine(kernel, memory, some, arguments, shared_bytes, counts)]
        with np.errstate(all="ignore"):
            while machines:
                machines += machines.pop().run()


class Machine:
    """Programs that have taken the same branches so far: their registers and shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        programs: range,
        arguments: Mapping[str, np.generic],
        shared_bytes: int,
        counts: Counts | None,
    ) -> None:
        self.kernel, self.memory, self.arguments, self.counts = kernel, memory, arguments, counts
        self.position = 0
        self.registers = {
            "%tid.x": np.arange(kernel.threads, dtype=U32)[None],
            "%ctaid.x": np.array(programs, U32)[:, None],
        }
        self.shape = len(programs), kernel.threads
        self.shared = np.zeros((len(programs), shared_bytes), "u1")
        self.shared_written = np.zeros(self.shared.shape, bool)

    def run(self) -> list["Machine"]:
        """Execute to the end, or to a branch where the programs part: then the two halves."""
        while True:
            instruction = self.kernel.instructions[self.position]
            self.position += 1
            try:
                guard = self._guard(instruction)
                if self.counts:
                    self.counts.add(instruction.opcode, int(self._all(guard).sum()))
                match instruction.opcode[0]:
                    case "ret" if guard is None:
                        return []
                    case "bra":
                        if halves := self._branch(instruction, guard):
                            return halves
                    case "ld" if "param" in instruction.opcode:
                        self._load_parameter(instruction)
                    case "ld":
                        self._load(instruction, guard)
                    case "st":
                        self._store(instruction, guard)
                    case "shfl":
                        self._shuffle(instruction)
                    case "bar":
                        pass  # threads are in lockstep
                    case _:
                        self._compute(instruction, guard)
            except AccessError as error:
                raise AccessError(f"{self.kernel.name}: {instruction.text}: {error}") from None

    def _guard(self, instruction: Instruction) -> Guard:
        if instruction.guard is None:
            return None
        guard = self._read(instruction.guard, TYPES["pred"]) ^ instruction.negated
        return None if guard.all() else guard

    def _all(self, guard: Guard) -> Array:
        """The guard of each thread, (programs, threads)."""
        return np.broadcast_to(np.True_ if guard is None else guard, self.shape)

    def _read(self, operand: str, dtype: np.dtype) -> Array:
        """A register, its lower bits if it is wider than the type, or a constant."""
        if operand.startswith("{"):  # {low, high}
            registers = vector(operand)
            part = np.dtype(f"u{dtype.itemsize // len(registers)}")
            parts = np.broadcast_arrays(*(self._read(register, part) for register in registers))
            return np.stack(parts, -1).view(dtype)[..., 0]
        if not operand.startswith("%"):
            return constant(operand, dtype)
        if operand not in self.registers:
            raise AccessError(f"{operand} is read before it is written")
        value = self.registers[operand]
        if value.dtype.itemsize > dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        return value.view(dtype)

    def _write(self, operand: str, value: Array, guard: Guard) -> None:
        if operand.startswith("{"):
            registers = vector(operand)
            part = np.dtype(f"u{value.itemsize // len(registers)}")
            parts = np.ascontiguousarray(value)[..., None].view(part)
            for i, register in enumerate(registers):
                self._write(register, parts[..., i], guard)
            return
        bits = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")
        if guard is not None:
            # Without a value before: all ones, which is NaN as a float.
            bits = np.where(guard, bits, self.registers.get(operand, ~bits.dtype.type(0)))
        self.registers[operand] = bits

    def _compute(self, instruction: Instruction, guard: Guard) -> None:
        target, *sources = instruction.operands
        inputs, function = decode(instruction.opcode, len(sources))
        values = [self._read(x, dtype) for x, dtype in zip(sources, inputs, strict=True)]
        self._write(target, function(*values), guard)

    def _branch(self, instruction: Instruction, guard: Guard) -> list["Machine"]:
        target = self.kernel.labels[instruction.operands[-1]]
        taken = np.all(self._all(guard), axis=1)
        if np.any(taken != np.any(self._all(guard), axis=1)):
            raise NotImplementedError(f"threads of a program part: {instruction.text}")
        if taken.all():
            self.position = target
        elif taken.any():
            return [self._part(taken, target), self._part(~taken, self.position)]
        return []

    def _part(self, programs: Array, position: int) -> "Machine":
        """A machine that continues at a position with some of the programs."""
        part = copy.copy(self)
        part.position, part.shape = position, (int(programs.sum()), self.shape[1])
        part.shared, part.shared_written = self.shared[programs], self.shared_written[programs]
        part.registers = {
            name: value[programs] if len(value) > 1 else value
            for name, value in self.registers.items()
        }
        return part

    def _load_parameter(self, instruction: Instruction) -> None:
        register, operand = instruction.operands
        self._write(register, self.arguments[operand.strip("[] ")].reshape(1, 1), None)

    def _access(self, operand: str, shared: bool, guard: Guard) -> tuple[Memory, Array]:
        """The memory that an operand [address] means, and the address of each thread."""
        base, offset = address(operand)
        width = self.kernel.width(base) if base.startswith("%") else 8
        addresses = self._read(base, np.dtype(f"u{width}")).astype("i8") + offset
        if not shared:
            return self.memory, addresses
        size = self.shared.shape[1]
        region = Region(0, self.shared.reshape(-1), self.shared_written.reshape(-1))
        if (((addresses < 0) | (addresses >= size)) & self._all(guard)).any():
            raise AccessError(f"out of bounds of {size} bytes of shared memory")
        return Memory([region]), addresses + size * np.arange(self.shape[0])[:, None]

    def _load(self, instruction: Instruction, guard: Guard) -> None:
        targets, operand = instruction.operands
        registers = vector(targets)
        shared, dtype = "shared" in instruction.opcode, TYPES[instruction.opcode[-1]]
        memory, addresses = self._access(operand, shared, guard)
        if guard is None:
            values = memory.load(addresses.ravel(), dtype, len(registers))
            values = values.reshape(-1, *addresses.shape)
        else:
            guard, addresses = np.broadcast_arrays(guard, addresses)
            values = np.zeros((len(registers), *guard.shape), dtype)
            if guard.any():
                values[:, guard] = memory.load(addresses[guard], dtype, len(registers))
        if self.counts and not shared:
            self._count(self.counts.loads, addresses, guard, dtype.itemsize * len(registers))
        for register, value in zip(registers, values, strict=True):
            width = self.kernel.width(register)  # a narrower value is extended
            self._write(register, value.astype(f"{dtype.kind}{width}"), guard)

    def _store(self, instruction: Instruction, guard: Guard) -> None:
        operand, sources = instruction.operands
        registers = vector(sources)
        shared, dtype = "shared" in instruction.opcode, TYPES[instruction.opcode[-1]]
        memory, addresses = self._access(operand, shared, guard)
        inputs = [self._read(register, dtype) for register in registers]
        active = self._all(guard)
        if active.any():
            everywhere = [np.broadcast_to(x, self.shape)[active] for x in (addresses, *inputs)]
            memory.store(everywhere[0], np.stack(everywhere[1:]))
        if self.counts and not shared:
            self._count(self.counts.stores, addresses, guard, dtype.itemsize * len(registers))

    def _count(self, traffic: Traffic, addresses: Array, guard: Guard, width: int) -> None:
        traffic.add(np.broadcast_to(addresses, self.shape), self._all(guard), width)

    def _shuffle(self, instruction: Instruction) -> None:
        """shfl.sync.bfly: each thread reads from the one whose number differs in these bits."""
        target, source, bits = instruction.operands[:3]
        if "bfly" not in instruction.opcode:
            raise NotImplementedError(instruction.text)
        value = np.broadcast_to(self._read(source, U32), self.shape)
        threads = np.arange(self.shape[1])
        self._write(target, value[:, threads ^ int(bits)], None)


@cache
def constant(text: str, dtype: np.dtype) -> Array:
    """A number as PTX writes it, (1, 1); the only name is that of shared memory, address 0."""
    if text[:2] in ("0f", "0d"):  # the bits of a float
        value = int(text[2:], 16)
    else:
        value = 0 if text[0].isalpha() else int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.full((1, 1), value != 0)
    mask = 2 ** (8 * dtype.itemsize) - 1
    return np.full((1, 1), value & mask, f"u{dtype.itemsize}").view(dtype)


@cache
def vector(operand: str) -> tuple[str, ...]:
    """The registers of {%r1, %r2}, or of %r1 alone."""
    return tuple(re.findall(r"[^{},\s]+", operand))


@cache
def address(operand: str) -> tuple[str, int]:
    """The register or name of [%rd1+8], and the offset in bytes."""
    base, _, offset = re.sub(r"[\[\]\s]", "", operand).partition("+")
    return base, int(offset or "0", 0)
