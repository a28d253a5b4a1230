"""Counts what a launch asks of a GPU: instructions, bytes, and the sectors that they lie in."""

from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array

SECTOR = 32  # bytes: the unit in which a GPU moves memory
WARP = 32  # threads, whose accesses become one request


@dataclass
class Traffic:
    """Global loads, or stores: bytes that threads ask for, sectors summed over the requests."""

    bytes: int = 0
    sectors: int = 0

    def add(self, addresses: Array, active: Array, width: int) -> None:
        """Add an access of each active thread; both arrays are (programs, threads)."""
        self.bytes += width * int(active.sum())
        sectors = np.where(active, addresses // SECTOR, -1).reshape(-1, WARP)
        sectors.sort(axis=1)
        first = np.diff(sectors, axis=1, prepend=-1) != 0
        self.sectors += int(first.sum())


@dataclass
class Counts:
    """The work of one launch, summed over its threads."""

    instructions: int = 0
    special: int = 0  # operations of the special-function unit
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)

    def add(self, opcode: tuple[str, ...], threads: int) -> None:
        """Add an instruction that this many threads execute."""
        self.instructions += threads
        if opcode[0] == "ex2" or opcode == ("div", "full", "f32"):
            self.special += threads
