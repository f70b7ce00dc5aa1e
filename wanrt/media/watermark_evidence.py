"""What frames say about the watermark: a small map, summed over them, in which chips are read."""

from functools import lru_cache

import numpy as np

from wanrt.media.watermark_key import GRIDS

SAMPLES = 2  # per chip and direction, in the map of a grid
_NEAR = 5  # samples: the neighbourhood of which a sample must stand out
_FLOOR = 0.02  # levels squared, so that flat pictures divide by something
_LUMA = np.array([77, 150, 29], np.float32) / 256


class Evidence:
    """Sums over frames of any size; holds a map for each grid, whatever the number of frames."""

    def __init__(self, grids: tuple[int, ...] = GRIDS) -> None:
        self.num_frames = 0
        self._maps = {grid: np.zeros((SAMPLES * grid,) * 2) for grid in grids}

    def add(self, frame: np.ndarray) -> None:
        """uint8 `[H, W, 3]`."""
        assert frame.dtype == np.uint8 and frame.shape[2:] == (3,), f"{frame.dtype} {frame.shape}"
        height, width, _ = frame.shape
        luma = frame.astype(np.float32) @ _LUMA
        for grid, samples in self._maps.items():
            side = SAMPLES * grid
            samples += _outstanding(_areas(height, side) @ luma @ _areas(width, side).T)
        self.num_frames += 1

    def map(self, grid: int) -> np.ndarray:
        """float64 `[2 * grid, 2 * grid]`."""
        return self._maps[grid]


def correlation(chips: np.ndarray, signs: np.ndarray) -> float:
    """Of what was read, `[n, n]`, with signs (0 where it does not matter), in standard deviations.

    Signs drawn at random would have a mean of 0 and a variance of 1, whatever was read.
    """
    size = np.sqrt(np.square(chips[signs != 0]).sum())
    return float((chips * signs).sum() / size) if size else 0.0


def chips_of(samples: np.ndarray) -> np.ndarray:
    """Chips `[n, n]` of a map `[2n, 2n]`, for a picture that is neither cropped nor mirrored."""
    grid = len(samples) // SAMPLES
    return samples.reshape(grid, SAMPLES, grid, SAMPLES).sum((1, 3))


def _outstanding(small: np.ndarray) -> np.ndarray:
    """How much each sample stands out of its neighbourhood, from -1 to 1."""
    high = small.astype(np.float64)
    high -= _box(high)
    return np.tanh(high / np.sqrt(_box(high * high) + _FLOOR))


def _box(values: np.ndarray) -> np.ndarray:
    """Mean of the 5 x 5 neighbourhood; beyond the edge, the edge is repeated."""
    half = _NEAR // 2
    for axis in (0, 1):
        ends = [(half, half) if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(values, ends, mode="edge")
        count = values.shape[axis]
        parts = (padded.take(range(i, i + count), axis) for i in range(_NEAR))
        values = sum(parts) / _NEAR
    return values


@lru_cache(maxsize=12)
def _areas(pixels: int, samples: int) -> np.ndarray:
    """float32 `[samples, pixels]`: the mean of the pixels, or parts of them, under each sample."""
    edges = np.linspace(0, pixels, samples + 1)
    return (overlaps(edges, np.arange(pixels + 1.0)) * (samples / pixels)).astype(np.float32)


def overlaps(edges: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Lengths `[n, m]` that n intervals share with m others, from their n + 1 and m + 1 edges."""
    begin = np.maximum(edges[:-1, None], others[None, :-1])
    end = np.minimum(edges[1:, None], others[None, 1:])
    return np.maximum(0, end - begin)
