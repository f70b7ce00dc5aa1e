"""Brings out the watermark in a map of a picture: where it is quiet, and in which frequencies."""

from functools import cache

import numpy as np

from wanrt.media.watermark_key import LOW_CUT

SAMPLES = 2  # per chip and direction, in the map of a grid
_NEAR = 5  # samples: the neighbourhood of which a sample must stand out
_FLOOR = 1.0  # levels squared: what stands out by less than a level counts less
_QUIET = 2.0  # levels squared: samples count by the fourth root of this plus the variance there
_SMOOTH = 9  # frequencies, over which the power is averaged


def outstanding(small: np.ndarray) -> np.ndarray:
    """How much each sample stands out of its neighbourhood; more weight where that is quiet.

    float `[2n, 2n]` in levels -> float64 of RMS 1, or all 0 for a flat picture.
    """
    high = small.astype(np.float64)
    high -= _box(high, _NEAR, "edge")
    variance = _box(high * high, _NEAR, "edge")
    values = np.tanh(high / np.sqrt(variance + _FLOOR)) / (variance + _QUIET) ** 0.25
    size = np.sqrt(np.mean(values * values))
    return values / size if size > 0 else values


def whitened(samples: np.ndarray) -> np.ndarray:
    """float64 `[2n, 2n]`, each frequency by the pattern's share of it over what the map has there.

    The map's share is the root of its mean power over 9 x 9 frequencies.
    """
    spectrum = np.fft.fft2(samples)
    found = np.sqrt(_box(np.abs(spectrum) ** 2, _SMOOTH, "wrap"))
    weights = np.divide(_pattern(len(samples)), found, out=np.zeros_like(found), where=found > 0)
    return np.fft.ifft2(spectrum * weights).real


@cache
def _pattern(count: int) -> np.ndarray:
    """What a pattern of random chips has in each frequency, float64 `[2n, 2n]`.

    Linear interpolation between chips spreads one over four samples, a quarter, three, three and
    one; then a share of the mean of 3 x 3 chips is taken off.
    """
    turns = 2 * np.pi * np.fft.fftfreq(count)
    spread = 1.5 * np.cos(turns / 2) + 0.5 * np.cos(3 * turns / 2)
    mean = (1 + 2 * np.cos(SAMPLES * turns)) / 3
    return np.abs(np.outer(spread, spread) * (1 - LOW_CUT * np.outer(mean, mean)))


def _box(values: np.ndarray, size: int, beyond: str) -> np.ndarray:
    """Mean of the size x size neighbourhood; `beyond` the edge as for `np.pad`."""
    half = size // 2
    for axis in (0, 1):
        ends = [(half, half) if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(values, ends, mode=beyond)
        count = values.shape[axis]
        parts = (padded.take(range(i, i + count), axis) for i in range(size))
        values = sum(parts) / size
    return values
