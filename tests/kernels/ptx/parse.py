"""Reads PTX text: an entry's parameters, registers, instructions and labels."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of PTX, e.g. `@!%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+8];`."""

    text: str
    guard: str | None  # %p1: the predicate of the threads that take part
    negated: bool  # @!
    opcode: tuple[str, ...]  # ld, global, v4, b32
    operands: tuple[str, ...]  # a register, number, label, {registers} or [address]


@dataclass(frozen=True)
class Kernel:
    """One entry of a PTX module."""

    name: str
    parameters: tuple[str, ...]
    threads: int  # of a program
    widths: dict[str, int]  # bytes of a register by its prefix: %rd -> 8; 0 for predicates
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the index of the instruction that follows

    def width(self, register: str) -> int:
        """The bytes of a register."""
        return self.widths[register.rstrip("0123456789")]


def parse(ptx: str) -> Kernel:
    """The first entry of a PTX module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    head, _, body = text[text.index(".entry") :].partition("{")
    kinds = re.findall(r"\.reg\s+\.([a-z]+)(\d*)\s+(%[a-z]+)<", body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r"[;\n]", body.split("\n}")[0]):
        rest = statement.strip()
        while label := re.match(r"(\$\w+):\s*", rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if rest and not rest.startswith((".", "{", "}")):
            instructions.append(_instruction(rest))
    return Kernel(
        name=re.findall(r"\.entry\s+(\w+)", head)[0],
        parameters=tuple(re.findall(r"\.param[^,)]*?(\w+)\s*(?=[,)])", head)),
        threads=int(re.findall(r"\.reqntid\s+(\d+)", head)[0]),
        widths={prefix: int(bits or 0) // 8 for _, bits, prefix in kinds},
        instructions=tuple(instructions),
        labels=labels,
    )


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if not match:
        raise NotImplementedError(f"not understood: {text}")
    negation, guard, opcode, arguments = match.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", arguments)
    opcode = opcode.replace("shared::cta", "shared")  # the same space
    return Instruction(text, guard, negation == "!", tuple(opcode.split(".")), tuple(operands))
