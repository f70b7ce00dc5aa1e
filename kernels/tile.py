"""What one program of a convolution computes: its pixels, and channels that waste little."""

from typing import NamedTuple

from triton import cdiv


class Tile(NamedTuple):
    """One program's output pixels and channels, its step through the input channels, its warps.

    Its channels are a wide part and a narrow one, two products of the same pixels: 96 channels are
    no power of two, and 128 in one product take more registers than in two.
    """

    pixels: int
    wide: int
    narrow: int
    step: int
    warps: int
    stages: int


# 96 is what the widths of Wan 2.1 are multiples of, 80 and 128 those of 2.2.
_WIDTHS = ((64, 64), (64, 32), (64, 16), (64, 0), (32, 16), (32, 0), (16, 0))
_READING = 32  # to read its pixels costs a program about as much as this many channels more


def widths(out_channels: int) -> tuple[int, int]:
    """A wide part and a narrow one, or 0, that waste least."""
    return min(_WIDTHS, key=lambda w: cdiv(out_channels, sum(w)) * (sum(w) + _READING))
