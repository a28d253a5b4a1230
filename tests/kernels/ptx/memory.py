"""Memory whose every access is checked: bounds, alignment, bytes that nobody has written."""

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
    written: Array | None  # bool for each byte; None: all are


class Memory:
    """The allocations that a launch was given. Addresses are those of the process."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def load(self, addresses: Array, dtype: np.dtype, count: int) -> Array:
        """`count` numbers from each address, (count, addresses)."""
        region, index = self._find(addresses, dtype.itemsize * count)
        if region.written is not None:
            width = dtype.itemsize * count
            if not _vectors(region.written, np.dtype(bool), width)[index].all():
                raise AccessError("load of bytes that nobody has written")
        return _vectors(region.data, dtype, count)[index].T

    def store(self, addresses: Array, values: Array) -> None:
        """Write values (count, addresses), each column to its address."""
        count, width = len(values), values.dtype.itemsize * len(values)
        region, index = self._find(addresses, width)
        _vectors(region.data, values.dtype, count)[index] = values.T
        if region.written is not None:
            _vectors(region.written, np.dtype(bool), width)[index] = True

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
