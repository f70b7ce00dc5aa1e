"""The watermark: an identifier added to the brightness of every frame, as one faint fixed pattern.

Described for third parties in docs/watermark.md. All arithmetic on pixels is in whole numbers, so
that a CPU and a GPU give the same bits.
"""

import numpy as np
import torch
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.media.watermark_code import ID_BITS
from wanrt.media.watermark_evidence import Evidence, chips_of, correlation
from wanrt.media.watermark_key import NAME, grid_for, key

__all__ = ["NAME", "Watermark"]

MIN_SIDE = 64  # pixels; smaller frames are left alone
FLAT = 3  # levels: a frame whose brightness spans no more is left alone, nothing hides a pattern
CARRIED = 16.0  # standard deviations: what is read back this clearly is read back whole

BLOCK = 8  # pixels: the strength is one number per block
LOW_CUT = 0.7
# By the grid: strength where there is no texture (levels RMS), and what most texture adds as a
# share of it. A codec leaves less of a small picture's chips, and less where there is texture.
STRENGTHS = {96: (1.5, 0.5), 64: (2.4, 0.15), 32: (1.7, 1.0)}
_HEADROOM = 8  # levels from black and white below which the strength fades
_MAX_VARIANCE = 400  # of the brightness within a block: more adds nothing
_ONE = 32  # fixed point: a pattern value and a strength of 1
_SHIFT = 10  # their product's


class Watermark:
    """Marks the frames of one clip, in chunks of any size: each frame by itself, alike in each run.

    Cost: about ten elementwise passes over each frame.
    """

    def __init__(self, identifier: int, height: int, width: int) -> None:
        """`identifier` has 32 bits; raises UsageError for others."""
        if isinstance(identifier, bool) or not isinstance(identifier, int):
            raise UsageError(f"the watermark's identifier is {identifier!r}; it is a whole number")
        if not 0 <= identifier < 1 << ID_BITS:
            raise UsageError(f"the watermark's identifier {identifier} is not of {ID_BITS} bits")
        self.height, self.width = height, width
        grid = grid_for(height, width)
        self._chips = key(grid).chips(identifier)
        self._pattern = _blocked(pixel_pattern(self._chips, height, width))
        self._strengths = strength_table(grid)
        self._evidence: Evidence | None = Evidence((grid,))

    @property
    def carried(self) -> bool:
        """Whether the marked frames so far, before any compression, can be read."""
        return self._evidence is None

    def apply(self, frames: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """uint8 `[n, H, W, 3]` -> the same, marked; the input is left as it is."""
        assert frames.shape[1:] == (self.height, self.width, 3), f"{frames.shape=}"
        assert frames.dtype in (np.uint8, torch.uint8), f"{frames.dtype=}"
        if min(self.height, self.width) < MIN_SIDE:
            return frames.clone() if isinstance(frames, Tensor) else frames.copy()
        if isinstance(frames, Tensor):
            return self._apply(frames)
        return self._apply(torch.from_numpy(np.ascontiguousarray(frames))).numpy()

    def _apply(self, frames: Tensor) -> Tensor:
        self._pattern = self._pattern.to(frames.device)
        self._strengths = self._strengths.to(frames.device)
        out = torch.empty_like(frames, memory_format=torch.contiguous_format)
        for frame, marked in zip(frames, out, strict=True):
            mark(frame, self._pattern, self._strengths, marked)
            self._watch(marked)
        return out

    def _watch(self, marked: Tensor) -> None:
        """Read the frame back, until it is known that this clip can be read."""
        if self._evidence is None:
            return
        self._evidence.add(marked.cpu().numpy())
        grid = len(self._chips)
        if correlation(chips_of(self._evidence.map(grid)), self._chips) >= CARRIED:
            self._evidence = None


def mark(frame: Tensor, pattern: Tensor, strengths: Tensor, out: Tensor) -> None:
    """Write the marked uint8 `[H, W, 3]` to `out`; pattern and strengths lie on its device.

    Texture and headroom are taken from every second pixel each way.
    """
    height, width, _ = frame.shape
    rows, _, columns, _ = pattern.shape
    strength = strengths_of(frame, rows, columns, strengths)
    change = pattern * strength[:, None, :, None]
    change.add_(1 << (_SHIFT - 1)).bitwise_right_shift_(_SHIFT)
    change = change.view(rows * BLOCK, columns * BLOCK * 3)[:height, : width * 3]
    sums = change + frame.reshape(height, width * 3)  # uint8 joins int16
    out.copy_(sums.clamp_(0, 255).view(height, width, 3))


def strengths_of(frame: Tensor, rows: int, columns: int, table: Tensor) -> Tensor:
    """int16 `[rows, columns]`, one for each block; all 0 where the frame is flat."""
    thin = frame[::2, ::2].to(torch.int32)
    bright = (thin[..., 0] + 2 * thin[..., 1] + thin[..., 2]) >> 2  # [h, w]
    low, high = bright.aminmax()
    side = BLOCK // 2
    count = side * side
    bright = bright[_repeat_last(bright.shape[0], rows * side, frame.device)]
    bright = bright[:, _repeat_last(bright.shape[1], columns * side, frame.device)]
    blocks = bright.view(rows, side, columns, side)
    total, squares = blocks.sum((1, 3)), (blocks * blocks).sum((1, 3))
    variance = (squares * count - total * total).div_(count * count, rounding_mode="floor")
    mean = total.div_(count, rounding_mode="floor")
    room = torch.minimum(mean, 255 - mean).clamp_(max=_HEADROOM)
    room *= high - low > FLAT
    strength = table[variance.clamp_(max=_MAX_VARIANCE)] * room.to(torch.int16)
    return strength.div_(_HEADROOM, rounding_mode="floor")


def _repeat_last(count: int, padded: int, device: torch.device) -> Tensor:
    return torch.arange(padded, device=device).clamp_(max=count - 1)


def strength_table(grid: int) -> Tensor:
    """int16 `[401]`, in fixed point: the strength by the variance of a block's brightness."""
    flat, texture = STRENGTHS[grid]
    deviation = np.sqrt(np.arange(_MAX_VARIANCE + 1) / _MAX_VARIANCE)
    return torch.from_numpy(np.rint(_ONE * flat * (1 + texture * deviation)).astype(np.int16))


def pixel_pattern(chips: np.ndarray, height: int, width: int) -> np.ndarray:
    """The chips as float64 pixels `[H, W]`, of RMS 1.

    Of each chip, 0.7 of the mean of its 3 x 3 neighbourhood is taken off (low frequencies carry
    nothing: there pictures drown them); between the centres of chips it is interpolated.
    """
    grid = len(chips)
    around = np.pad(chips.astype(np.float64), 1)
    near = sum(around[i : i + grid, j : j + grid] for i in range(3) for j in range(3)) / 9
    pixels = _hats(height, grid) @ (chips - LOW_CUT * near) @ _hats(width, grid).T
    return pixels / np.sqrt(np.mean(pixels * pixels))


def _hats(pixels: int, grid: int) -> np.ndarray:
    """Weights `[pixels, grid]` of linear interpolation, zero beyond the outermost chips."""
    place = (np.arange(pixels) + 0.5) / pixels * grid - 0.5
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(grid)))


def _blocked(pixels: np.ndarray) -> Tensor:
    """int16 `[rows, 8, columns, 24]` in fixed point, padded, each pixel thrice: R, G and B."""
    height, width = pixels.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    fixed = np.zeros((rows * BLOCK, columns * BLOCK), np.int16)
    fixed[:height, :width] = np.rint(_ONE * pixels)
    thrice = np.repeat(fixed, 3, axis=1)
    return torch.from_numpy(thrice.reshape(rows, BLOCK, columns, 3 * BLOCK))
