"""The public key of the watermark: which sign each chip of the grid has, and what it carries.

A grid of n x n chips lies over the whole picture, whatever its size and shape. Everything follows
from SHAKE-256 of two names, so that anybody can build it.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from wanrt.media.watermark_code import CODED_BITS, encode

NAME = "org.wanrt.ss.1"
GRIDS = (96, 64, 32)  # chips per side
LOW_CUT = 0.7  # share of their neighbourhood's mean that chips lose before they are added
_FROM = {96: 400, 64: 160, 32: 0}  # pixels of the shorter side from which a grid is used
_COPIES = {96: 54, 64: 24, 32: 6}  # chips per coded bit; the others are known beforehand (sync)


@dataclass(frozen=True)
class Key:
    """Of one grid: signs int8 `[n * n]` in rows; which chips are sync, which carry which bit."""

    grid: int
    signs: np.ndarray
    sync: np.ndarray  # [s], positions
    data: np.ndarray  # [copies, 144], positions

    def chips(self, identifier: int) -> np.ndarray:
        """Signs float32 `[n, n]` of a picture that carries the identifier."""
        chips = self.signs.astype(np.float32)
        chips[self.data] *= encode(identifier)
        return chips.reshape(self.grid, self.grid)

    def data_chips(self, identifier: int) -> np.ndarray:
        """float32 `[n, n]`: the signs that carry the identifier, 0 for those known beforehand."""
        chips = self.chips(identifier)
        chips.ravel()[self.sync] = 0
        return chips

    def sync_chips(self) -> np.ndarray:
        """float32 `[n, n]`: the signs known beforehand, 0 elsewhere."""
        chips = np.zeros(self.grid**2, np.float32)
        chips[self.sync] = self.signs[self.sync]
        return chips.reshape(self.grid, self.grid)


@cache
def key(grid: int) -> Key:
    """Signs: the bits of SHAKE-256("org.wanrt.ss.1 signs N"), highest first, 1 for minus.

    Places: the chips in the order of the 32-bit big-endian words of SHAKE-256("... order N"), one
    for each chip. The first 144 * copies carry the coded bits in turn, the rest is sync.
    """
    count = grid * grid
    bits = np.unpackbits(np.frombuffer(_bytes("signs", grid, count // 8), np.uint8))
    words = np.frombuffer(_bytes("order", grid, 4 * count), ">u4")
    order = np.argsort(words, kind="stable")
    data, sync = np.split(order, [CODED_BITS * _COPIES[grid]])
    signs = 1 - 2 * bits.astype(np.int8)
    return Key(grid, signs, sync, data.reshape(-1, CODED_BITS))


def _bytes(what: str, grid: int, count: int) -> bytes:
    return hashlib.shake_256(f"{NAME} {what} {grid}".encode()).digest(count)


def grid_for(height: int, width: int) -> int:
    """Chips per side for a picture of this size."""
    return next(grid for grid in GRIDS if min(height, width) >= _FROM[grid])
