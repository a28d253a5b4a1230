"""Executes PTX: many programs of a launch at once, all their threads in lockstep, so that a missing
barrier does not show.

A register is an array that broadcasts to (programs, threads): (1, 1) where all share its value,
(programs, 1) where the threads of each program do. A branch is taken by whole programs; where
programs part, the machine splits in two, and each runs to its end.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .arithmetic import TYPES, Array, decode
from .memory import AccessError, Counts, Memory, Region
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
        AccessError: an access that memory.py refuses.
        NotImplementedError: an instruction that no kernel has needed so far.
    """
    size = max(1, THREADS_AT_ONCE // kernel.threads)
    for start in range(0, programs, size):
        some = np.arange(start, min(start + size, programs), dtype=U32)[:, None]
        data = np.full(len(some) * shared_bytes, 255, "u1")  # NaN as a float
        shared = Memory([Region(start * shared_bytes, data)])
        registers = {name: value.reshape(1, 1) for name, value in arguments.items()}
        registers |= {"%tid.x": np.arange(kernel.threads, dtype=U32)[None], "%ctaid.x": some}
        shape = len(some), kernel.threads
        machines = [Machine(kernel, memory, counts, shared, shared_bytes, shape, registers)]
        with np.errstate(all="ignore"):
            while machines:
                machines += machines.pop().run()


@dataclass
class Machine:
    """Programs that have taken the same branches so far."""

    kernel: Kernel
    memory: Memory
    counts: Counts | None
    shared: Memory  # of all programs, one behind the other
    shared_bytes: int  # of each
    shape: tuple[int, int]  # programs, threads
    registers: dict[str, Array]  # and the kernel's parameters
    position: int = 0

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
                        register, name = instruction.operands
                        self._write(register, self.registers[name.strip("[] ")], None)
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
        """A register, its lower bits if it is wider than the type, or a constant. Reading a
        register that nobody has written is a KeyError."""
        if operand.startswith("{"):  # {low, high}
            registers = vector(operand)
            part = np.dtype(f"u{dtype.itemsize // len(registers)}")
            parts = np.broadcast_arrays(*(self._read(register, part) for register in registers))
            return np.stack(parts, -1).view(dtype)[..., 0]
        if not operand.startswith("%"):
            return constant(operand, dtype)
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
        registers = {
            name: value[programs] if len(value) > 1 else value
            for name, value in self.registers.items()
        }
        shape = int(programs.sum()), self.shape[1]
        return replace(self, position=position, shape=shape, registers=registers)

    def _access(
        self, instruction: Instruction, operand: str, guard: Guard, count: int
    ) -> tuple[Memory, Array]:
        """The memory that an operand [address] means, and the address of each thread; counted."""
        base, offset = address(operand)
        width = self.kernel.width(base) if base.startswith("%") else 8
        addresses = self._read(base, np.dtype(f"u{width}")).astype("i8") + offset
        if "shared" not in instruction.opcode:
            if self.counts:
                loads = instruction.opcode[0] == "ld"
                traffic = self.counts.loads if loads else self.counts.stores
                size = TYPES[instruction.opcode[-1]].itemsize * count
                traffic.add(np.broadcast_to(addresses, self.shape), self._all(guard), size)
            return self.memory, addresses
        if (((addresses < 0) | (addresses >= self.shared_bytes)) & self._all(guard)).any():
            raise AccessError(f"out of bounds of {self.shared_bytes} bytes of shared memory")
        return self.shared, addresses + self.registers["%ctaid.x"].astype("i8") * self.shared_bytes

    def _load(self, instruction: Instruction, guard: Guard) -> None:
        targets, operand = instruction.operands
        registers, dtype = vector(targets), TYPES[instruction.opcode[-1]]
        memory, addresses = self._access(instruction, operand, guard, len(registers))
        active, addresses = np.broadcast_arrays(True if guard is None else guard, addresses)
        values = np.zeros((len(registers), *active.shape), dtype)
        if active.any():
            values[:, active] = memory.load(addresses[active], dtype, len(registers))
        for register, value in zip(registers, values, strict=True):
            width = self.kernel.width(register)  # a narrower value is extended
            self._write(register, value.astype(f"{dtype.kind}{width}"), guard)

    def _store(self, instruction: Instruction, guard: Guard) -> None:
        operand, sources = instruction.operands
        registers, dtype = vector(sources), TYPES[instruction.opcode[-1]]
        memory, addresses = self._access(instruction, operand, guard, len(registers))
        inputs = [self._read(register, dtype) for register in registers]
        active = self._all(guard)
        if active.any():
            everywhere = [np.broadcast_to(x, self.shape)[active] for x in (addresses, *inputs)]
            memory.store(everywhere[0], np.stack(everywhere[1:]))

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
        value = 0 if text[0].isalpha() else int(text, 0)
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
