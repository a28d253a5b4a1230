"""Memory whose every access is checked, bounds and alignment; and what a launch asks of it."""

from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array

SECTOR = 32  # bytes: the unit in which a GPU moves memory
WARP = 32  # threads, whose accesses become one request


class AccessError(RuntimeError):
    """An access that a GPU would refuse, or make to memory that the kernel was not given."""


@dataclass
class Region:
    """The bytes of one allocation, read and written in place."""

    start: int  # its address, a multiple of 16
    data: Array  # uint8


class Memory:
    """The allocations that a launch was given. Addresses are those of the process."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def load(self, addresses: Array, dtype: np.dtype, count: int) -> Array:
        """`count` numbers from each address, (count, addresses)."""
        region, index = self._find(addresses, dtype.itemsize * count)
        return _vectors(region.data, dtype, count)[index].T

    def store(self, addresses: Array, values: Array) -> None:
        """Write values (count, addresses), each column to its address."""
        region, index = self._find(addresses, values.dtype.itemsize * len(values))
        _vectors(region.data, values.dtype, len(values))[index] = values.T

    def _find(self, addresses: Array, width: int) -> tuple[Region, Array]:
        """The region of these addresses, and each address in it in units of `width` bytes."""
        misaligned = np.count_nonzero(addresses % width)
        if misaligned:
            raise AccessError(
                f"misaligned: {misaligned} addresses are not multiples of {width} bytes"
            )
        low, high = int(addresses.min()), int(addresses.max()) + width
        for region in self.regions:
            if region.start <= low and high <= region.start + len(region.data):
                return region, (addresses - region.start) // width
        raise AccessError(f"out of bounds: [{low:#x}, {high:#x}) lies in no tensor's storage")


def _vectors(data: Array, dtype: np.dtype, count: int) -> Array:
    """Bytes as rows of `count` numbers; a last row that is not whole is left out."""
    width = dtype.itemsize * count
    return data[: len(data) // width * width].view(dtype).reshape(-1, count)


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
