"""The watermark: an identifier added to the brightness of every frame, as one faint fixed pattern.

Described for third parties in docs/watermark.md. All arithmetic on pixels is in whole numbers, so
that a CPU and a GPU give the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanrt.env import ops_backend
from wanrt.errors import UsageError
from wanrt.kernels.reference_watermark import BLOCK, SHIFT
from wanrt.kernels.registry import here, resolve
from wanrt.kernels.target import UnsupportedOp
from wanrt.media.watermark_code import ID_BITS
from wanrt.media.watermark_detect import attempt
from wanrt.media.watermark_evidence import Evidence, correlation
from wanrt.media.watermark_key import LOW_CUT, NAME, grid_for, key

__all__ = ["NAME", "Watermark"]

MIN_SIDE = 64  # pixels; smaller frames are left alone
FLAT = 3  # levels: a frame of which no channel spans more is left alone, nothing hides a pattern
CARRIED = 13.0  # standard deviations: from about 12 on, the identifier is read without errors

# By the grid: strength where there is no texture (levels RMS), and what a block's texture adds to
# it. A codec leaves less of a small picture's chips, and less where there is texture.
STRENGTHS = {96: (1.25, 0.7), 64: (2.9, 0.15), 32: (1.7, 1.0)}
_TEXTURED = 20.0  # levels, standard deviation: of a block where that much is added
# What is added everywhere in a frame of which half the blocks have the second of these standard
# deviations (nothing at the first): there the picture itself drowns the pattern, and hides it.
_DENSE, _DENSE_FROM, _DENSE_TO = 0.5, 10.0, 25.0

_HEADROOM = 8  # levels from black and white below which the strength fades
_MAX_VARIANCE = 625  # the tables' last entry
_ONE = 32  # fixed point: a pattern value, a strength or a factor of 1
assert 1 << SHIFT == _ONE * _ONE


class Tables(NamedTuple):
    """int32 `[626]` in fixed point: by a block's variance; by the frame's median of them."""

    strength: Tensor
    dense: Tensor


class Watermark:
    """Marks the frames of one clip, in chunks of any size: each frame by itself, alike in each run.

    Cost: a pass over each frame, and small ones over a quarter of its pixels; until a clip is known
    to be read, a reading of each frame on the CPU (for most clips of the first one only).
    """

    def __init__(self, identifier: int, height: int, width: int) -> None:
        """`identifier` has 32 bits; raises UsageError for others."""
        if isinstance(identifier, bool) or not isinstance(identifier, int):
            raise UsageError(f"the watermark's identifier is {identifier!r}; it is a whole number")
        if not 0 <= identifier < 1 << ID_BITS:
            raise UsageError(f"the watermark's identifier {identifier} is not of {ID_BITS} bits")
        self.height, self.width = height, width
        grid = grid_for(height, width)
        self._grid, self._identifier = grid, identifier
        self._pattern = _blocked(pixel_pattern(key(grid).chips(identifier), height, width))
        self._tables = strength_tables(grid)
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
        return self._apply(torch.from_numpy(np.require(frames, None, ["C", "W"]))).numpy()

    def _apply(self, frames: Tensor) -> Tensor:
        self._pattern = self._pattern.to(frames.device)
        self._tables = Tables(*(table.to(frames.device) for table in self._tables))
        mark_frame = _choose(frames.device.type)
        rows, _, columns, _ = self._pattern.shape
        out = torch.empty_like(frames, memory_format=torch.contiguous_format)
        for frame, marked in zip(frames, out, strict=True):
            strength = strengths_of(frame, rows, columns, self._tables)
            marked.copy_(mark_frame(frame, self._pattern, strength))
            self._watch(marked)
        return out

    def _watch(self, marked: Tensor) -> None:
        """Read the frame back, until it is known that this clip can be read."""
        if self._evidence is None:
            return
        self._evidence.add(marked.cpu().numpy())
        chips = self._evidence.chips(self._grid)
        mine = key(self._grid).data_chips(self._identifier)
        if correlation(chips, mine) >= CARRIED and attempt(chips).identifier == self._identifier:
            self._evidence = None


def _choose(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op for where frames lie, which may be the CPU though the model is on a GPU."""
    backend = ops_backend()
    if device == "cpu" and backend == "triton":
        backend = "auto"
    try:
        return resolve("mark_frame", here(torch.uint8, device), backend).function
    except UnsupportedOp as error:
        raise UsageError(str(error)) from error


def strengths_of(frame: Tensor, rows: int, columns: int, tables: Tables) -> Tensor:
    """int16 `[rows, columns]`, one for each block; all 0 where the frame is flat.

    Brightness is (R + 2 G + B) / 4, of every second pixel each way.
    """
    thin = frame[::2, ::2].to(torch.int32)
    bright = (thin[..., 0] + 2 * thin[..., 1] + thin[..., 2]) >> 2  # [h, w]
    colours = thin.reshape(-1, 3)
    spans = (colours.amax(0) - colours.amin(0)).amax() > FLAT
    side = BLOCK // 2
    count = side * side
    bright = bright[_repeat_last(bright.shape[0], rows * side, frame.device)]
    bright = bright[:, _repeat_last(bright.shape[1], columns * side, frame.device)]
    blocks = bright.view(rows, side, columns, side)
    total, squares = blocks.sum((1, 3)), (blocks * blocks).sum((1, 3))
    variance = (squares * count - total * total).div_(count * count, rounding_mode="floor")
    variance.clamp_(max=_MAX_VARIANCE)
    mean = total.div_(count, rounding_mode="floor")
    room = torch.minimum(mean, 255 - mean).clamp_(max=_HEADROOM) * spans
    strength = tables.strength[variance] * tables.dense[variance.median()] * room
    return strength.div_(_ONE * _HEADROOM, rounding_mode="floor").to(torch.int16)


def _repeat_last(count: int, padded: int, device: torch.device) -> Tensor:
    return torch.arange(padded, device=device).clamp_(max=count - 1)


def strength_tables(grid: int) -> Tables:
    """See STRENGTHS and _DENSE."""
    flat, texture = STRENGTHS[grid]
    deviation = np.sqrt(np.arange(_MAX_VARIANCE + 1))
    strength = flat * (1 + texture * np.minimum(deviation / _TEXTURED, 1))
    part = ((deviation - _DENSE_FROM) / (_DENSE_TO - _DENSE_FROM)).clip(0, 1)
    both = (np.rint(_ONE * values).astype(np.int32) for values in (strength, 1 + _DENSE * part))
    return Tables(*map(torch.from_numpy, both))


def pixel_pattern(chips: np.ndarray, height: int, width: int) -> np.ndarray:
    """The chips as float64 pixels `[H, W]`, of RMS 1.

    Of each chip, a share of the mean of its 3 x 3 neighbourhood is taken off (low frequencies carry
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
    fixed[:height, :width] = np.rint(_ONE * pixels.clip(-4, 4))
    thrice = np.repeat(fixed, 3, axis=1)
    return torch.from_numpy(thrice.reshape(rows, BLOCK, columns, 3 * BLOCK))
