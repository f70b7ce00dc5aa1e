"""What frames say about the watermark: small maps, summed over them, in which chips are read.

A codec that is short of bits keeps the pattern in the frames that it codes for themselves, and
moves it along with the picture in those between. So frames count by how well the chips that are
known beforehand (sync) are seen in them.
"""

from functools import lru_cache

import numpy as np

from wanrt.media.watermark_filter import SAMPLES, outstanding, whitened
from wanrt.media.watermark_key import GRIDS, key

_LUMA = np.array([77, 150, 29], np.float32) / 256


class Evidence:
    """Sums over frames of any size; holds three maps for each grid, for any number of frames."""

    def __init__(self, grids: tuple[int, ...] = GRIDS) -> None:
        self.num_frames = 0
        # [as it is, mirrored, both alike]
        self._maps = {grid: np.zeros((3, SAMPLES * grid, SAMPLES * grid)) for grid in grids}

    def add(self, frame: np.ndarray) -> None:
        """uint8 `[H, W, 3]`."""
        assert frame.dtype == np.uint8 and frame.shape[2:] == (3,), f"{frame.dtype} {frame.shape}"
        height, width, _ = frame.shape
        luma = frame.astype(np.float32) @ _LUMA
        for grid, (plain, mirrored, alike) in self._maps.items():
            side = SAMPLES * grid
            samples = outstanding(_areas(height, side) @ luma @ _areas(width, side).T)
            sync = key(grid).sync_chips()
            alike += samples
            for total, seen in ((plain, samples), (mirrored, samples[:, ::-1])):
                total += max(0.0, correlation(chips_of(seen), sync)) ** 2 * seen
        self.num_frames += 1

    def chips(self, grid: int, mirrored: bool = False) -> np.ndarray:
        """float64 `[grid, grid]`, of a picture that was not cropped.

        They depend on the signs of the sync chips, not on those of the others.
        """
        return chips_of(whitened(self._maps[grid][int(mirrored)]))

    def map(self, grid: int) -> np.ndarray:
        """float64 `[2 * grid, 2 * grid]`, from all frames alike, in which to look for crops."""
        return whitened(self._maps[grid][2])


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
