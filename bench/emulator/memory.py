"""The memories that a kernel addresses: tensors in the host's RAM, and each block's shared memory.

Every access is checked: that it lies within one tensor that the kernel was given, and that it is
aligned to its width. A GPU checks the second; of the first it knows only pages.
"""

import ctypes
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wanrt.bench.emulator.program import EmulatorError

Array = NDArray  # of one value to a lane
POISON = 0xFF  # NaN in fp32, bf16, fp16 and e4m3: what shared memory holds before it is written


class Space:
    """Bytes that can be looked at as words of 1, 2, 4 and 8 bytes."""

    def __init__(self, base: int, data: NDArray[np.uint8]) -> None:
        self.base, self.size = base, data.size
        self._words = {
            width: data[: data.size // width * width].view(f"u{width}") for width in (1, 2, 4, 8)
        }

    def load(self, places: Array, width: int, count: int) -> Array:
        """Words `[count, lanes]` from byte offsets `places` `[lanes]`."""
        self._check(places, width * count)
        first = places.astype(np.int64) // width
        return self._words[width][first + np.arange(count)[:, None]]

    def store(self, places: Array, width: int, values: Array) -> None:
        """Words `[count, lanes]`; where lanes write to one place, the last lane's stay."""
        self._check(places, width * len(values))
        first = places.astype(np.int64) // width
        self._words[width][first + np.arange(len(values))[:, None]] = values

    def _check(self, places: Array, size: int) -> None:
        if not places.size:
            return
        if (places % size).any():
            raise EmulatorError(f"an access of {size} bytes is not aligned to them")
        least, most = int(places.min()), int(places.max())
        if least < 0 or most + size > self.size:
            beyond = least if least < 0 else most
            raise EmulatorError(f"{size} bytes at {beyond} of a memory of {self.size} bytes")


class GlobalMemory:
    """The storages of a launch's tensors, at the addresses they have."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage
        self._starts = sorted(found)
        self._spaces = [_space(start, found[start].nbytes()) for start in self._starts]

    def load(self, addresses: Array, width: int, count: int) -> Array:
        """Words `[count, lanes]`. Raises EmulatorError outside of every tensor."""
        values = np.empty((count, addresses.size), f"u{width}")
        for space, lanes in self._split(addresses):
            values[:, lanes] = space.load(addresses[lanes] - space.base, width, count)
        return values

    def store(self, addresses: Array, width: int, values: Array) -> None:
        for space, lanes in self._split(addresses):
            space.store(addresses[lanes] - space.base, width, values[:, lanes])

    def _split(self, addresses: Array) -> Iterable[tuple[Space, slice | Array]]:
        """The tensors that the lanes' addresses lie in, and the lanes of each."""
        if not addresses.size:
            return
        first, last = (self._find(int(a)) for a in (addresses.min(), addresses.max()))
        if first == last:
            yield self._spaces[first], slice(None)
            return
        owner = np.searchsorted(self._starts, addresses, "right") - 1
        for index in np.unique(owner):
            yield self._spaces[index], owner == index

    def _find(self, address: int) -> int:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            raise EmulatorError(f"address {address:#x} lies before every tensor of the launch")
        return index


def _space(start: int, size: int) -> Space:
    return Space(start, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)))


def shared_memory(blocks: int, size: int) -> Space:
    """Of so many thread blocks at once, one behind the other."""
    return Space(0, np.full(blocks * size, POISON, np.uint8))
