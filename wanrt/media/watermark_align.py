"""Finds how a marked picture was cropped or mirrored, by the chips that are known beforehand."""

from functools import cache
from typing import NamedTuple

import numpy as np

from wanrt.media.watermark_evidence import correlation, overlaps
from wanrt.media.watermark_filter import SAMPLES
from wanrt.media.watermark_key import key

SCALES = tuple(1 - 0.0125 * step for step in range(13))  # of the original's side that is left
CANDIDATES = 6
_ROOM = 1.25  # transforms are this much longer than the map: more than 1 / 0.85

# The refinement moves by these, twice.
_SCALE_MOVES = (-0.00625, 0.0, 0.00625)
_OFFSET_MOVES = (-1.0, -0.5, 0.0, 0.5, 1.0)


class Span(NamedTuple):
    """Which part of the original's height or width a picture shows."""

    scale: float = 1.0  # the picture's length over the original's
    offset: float = 0.0  # samples of the picture's map cut off before it


class Alignment(NamedTuple):
    """A crop, after which the picture may have been mirrored."""

    mirrored: bool
    rows: Span
    columns: Span


def read(samples: np.ndarray, how: Alignment) -> np.ndarray:
    """Chips `[n, n]` of a map `[2n, 2n]`; 0 for chips of which less than half is left."""
    samples = samples[:, ::-1] if how.mirrored else samples
    grid = len(samples) // SAMPLES
    return _weights(grid, how.rows) @ samples @ _weights(grid, how.columns).T


def candidates(samples: np.ndarray) -> list[Alignment]:
    """The most promising crops, best first, each refined.

    All offsets at once for each pair of scales, as a correlation by Fourier transforms; crops to
    85 % of either side or more are found. The transforms of all patterns, 60 MB, are kept.
    """
    side = len(samples)
    size = int(side * _ROOM)
    spectra = [np.conj(_transform(samples[:, ::step], size)) for step in (1, -1)]
    found = []
    for rows in SCALES:
        for columns in SCALES:
            template = _template(side // SAMPLES, rows, columns, size)
            reach = tuple(int(side / scale) - side + 1 for scale in (rows, columns))
            for mirrored, spectrum in enumerate(spectra):
                fits = np.fft.irfft2(template * spectrum, s=(size, size))[: reach[0], : reach[1]]
                top, left = np.unravel_index(fits.argmax(), fits.shape)
                spans = Span(rows, float(top)), Span(columns, float(left))
                found.append((float(fits[top, left]), Alignment(bool(mirrored), *spans)))
    found.sort(key=lambda one: -one[0])
    return [_refine(samples, how) for _, how in found[:CANDIDATES]]


def _refine(samples: np.ndarray, how: Alignment) -> Alignment:
    signs = key(len(samples) // SAMPLES).sync_chips()

    def fit(one: Alignment) -> float:
        return correlation(read(samples, one), signs)

    for _ in range(2):
        how = max((how._replace(rows=span) for span in _near(how.rows)), key=fit)
        how = max((how._replace(columns=span) for span in _near(how.columns)), key=fit)
    return how


def _near(span: Span) -> list[Span]:
    return [
        Span(span.scale + more, span.offset + shift)
        for more in _SCALE_MOVES
        for shift in _OFFSET_MOVES
    ]


def _edges(grid: int, span: Span) -> np.ndarray:
    """Of the original's chips, in samples of the picture's map."""
    return np.arange(grid + 1) * (SAMPLES / span.scale) - span.offset


def _weights(grid: int, span: Span) -> np.ndarray:
    """`[n, 2n]`: how much of each sample lies in each chip."""
    edges = _edges(grid, span)
    shared = overlaps(edges, np.arange(SAMPLES * grid + 1.0))
    shared[shared.sum(1) < (edges[1] - edges[0]) / 2] = 0
    return shared


@cache
def _template(grid: int, rows: float, columns: float, size: int) -> np.ndarray:
    """The transform of the sync chips as a map of the original in the picture's samples."""
    samples = np.arange(size + 1.0)
    down, across = (overlaps(samples, _edges(grid, Span(scale))) for scale in (rows, columns))
    return _transform(down @ key(grid).sync_chips() @ across.T, size)


def _transform(values: np.ndarray, size: int) -> np.ndarray:
    return np.fft.rfft2(values.astype(np.float32), s=(size, size))
