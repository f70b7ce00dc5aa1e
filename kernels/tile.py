"""What one program of a convolution computes: its pixels, and channels that waste little."""

from typing import NamedTuple

from torch import Tensor
from triton import cdiv


class Tile(NamedTuple):
    """One program's output pixels and channels, its step through the input channels, its warps.

    Its channels are a wide part and a narrow one, two products of the same pixels: 96 channels are
    no power of two, and 128 in one product take more registers than in two. `unroll` steps make a
    turn of the loop, which finds out once where its pixels lie and waits once for them.
    """

    pixels: int
    wide: int
    narrow: int
    step: int
    unroll: int
    warps: int
    stages: int

    @property
    def turn(self) -> int:
        """Input channels of a turn."""
        return self.step * self.unroll


# 96 is what the widths of Wan 2.1 are multiples of, 80 and 128 those of 2.2.
_WIDTHS = ((64, 64), (64, 32), (64, 16), (64, 0), (32, 16), (32, 0), (16, 0))
PIXELS = 256  # of a program: twice as many read weights half as often
WARP_PIXELS = 32  # of a warp. Of 16, each weight would be read from shared memory twice as often
_SHARED = {80: 160 << 10, 90: 216 << 10}  # bytes that a program may take; elsewhere 96 KiB
_READING = 32  # to read its pixels costs a program about as much as this many channels more


def widths(out_channels: int) -> tuple[int, int]:
    """A wide part and a narrow one, or 0, that waste least."""
    return min(_WIDTHS, key=lambda w: cdiv(out_channels, sum(w)) * (sum(w) + _READING))


def turns(tile: Tile, channels: int, num_bytes: int, arch: int, longest: int) -> tuple[int, ...]:
    """How many steps a turn may have, fewest first: those that divide a tap's channels.

    At most `longest` channels, and so many that the pixels and weights (`num_bytes` each) of two
    turns lie in shared memory at once; on 9.0, whose products read it while others are loaded, of
    three.
    """
    row = (3 if arch == 90 else 2) * num_bytes * (tile.pixels + tile.wide + tile.narrow)
    most = min(longest, _SHARED.get(arch, 96 << 10) // row) // tile.step
    steps = cdiv(channels, tile.step)
    return tuple(n for n in range(1, max(1, most) + 1) if steps % n == 0)


def check_frames(*clips: Tensor) -> None:
    """Places within a frame `[B, C, T, H, W]` are counted in 32 bits."""
    for clip in clips:
        numbers = clip.shape[1] * clip.shape[3] * clip.shape[4]
        assert numbers <= 2**31, f"a frame of {tuple(clip.shape)} has {numbers} numbers, over 2^31"
