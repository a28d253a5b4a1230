"""Memory whose every access is checked: bounds and alignment."""

from dataclasses import dataclass

import numpy as np

from .arithmetic import Array


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
