"""Reads the watermark: from frames to an identifier and a bound on the chance of being wrong."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from wanrt.media.watermark_align import CANDIDATES, candidates, read
from wanrt.media.watermark_code import ID_BITS, decode
from wanrt.media.watermark_evidence import Evidence, correlation
from wanrt.media.watermark_key import GRIDS, key

MAX_FALSE_POSITIVE = 1e-6
_LEAST = 1 / 3  # of the score read: two identifiers are so alike once in 20,000 times
ATTEMPTS = len(GRIDS) * (2 + CANDIDATES)  # as it is, mirrored, crops: what `judge` reads at most


@dataclass(frozen=True)
class Detection:
    """What was read. `score` is in standard deviations of an unmarked picture's.

    It is that of the likeliest identifier whose checksum held, 0 if there was none. other: where
    a certain identifier was asked for and is there, that of a second mark.
    """

    detected: bool
    identifier: int | None
    score: float
    false_positive_probability: float
    other: int | None = None


NOTHING = Detection(False, None, 0.0, 1.0)


def detect(frames: Iterable[np.ndarray], expected: int | None = None) -> Detection:
    """Read uint8 frames `[H, W, 3]`, one after the other; a picture is a clip of one frame.

    expected: the identifier that the frames should carry. If another one is read, or none, it is
    looked for by itself: a mark of something that the frames were made from may lie over it.
    """
    evidence = Evidence()
    for frame in frames:
        evidence.add(frame)
    found = judge(evidence)
    if expected is None or found.identifier == expected or not evidence.num_frames:
        return found
    asked = _ask(evidence, expected, found.identifier)
    return asked if asked.detected and asked.score >= _LEAST * found.score else found


def judge(evidence: Evidence) -> Detection:
    """What the frames that were added say. Crops are searched for only if nothing else is found."""
    best = NOTHING
    if not evidence.num_frames:
        return best
    for chips in _readings(evidence):
        found = attempt(chips)
        if found.detected:
            return found
        best = max(best, found, key=lambda one: one.score)
    return replace(best, identifier=None)


def _readings(evidence: Evidence) -> Iterator[np.ndarray]:
    for grid in GRIDS:
        for mirrored in (False, True):
            yield evidence.chips(grid, mirrored)
    for grid in GRIDS:
        samples = evidence.map(grid)
        for how in candidates(samples):
            yield read(samples, how)


def attempt(chips: np.ndarray) -> Detection:
    """What chips `[n, n]` say, as one of ATTEMPTS."""
    identifier = decode(soft_bits(chips))
    if identifier is None:
        return NOTHING
    score = correlation(chips, key(len(chips)).data_chips(identifier))
    chance = false_positive_probability(score)
    return Detection(chance <= MAX_FALSE_POSITIVE, identifier, score, chance)


def soft_bits(chips: np.ndarray) -> np.ndarray:
    """float `[144]`: the coded bits of chips `[n, n]`, positive for 0."""
    here = key(len(chips))
    return (chips.ravel()[here.data] * here.signs[here.data]).sum(0)


def _ask(evidence: Evidence, identifier: int, beside: int | None) -> Detection:
    """Whether a picture that was not cropped carries this identifier, beside another one or alone.

    Two marks agree in some chips and differ in others. The mean over both kinds, each counted as
    a half, is what this mark adds: the other one cancels.
    """
    score = 0.0
    for grid in GRIDS:
        chips, signs = evidence.chips(grid), key(grid).data_chips(identifier)
        if beside is not None:
            agree = signs * key(grid).data_chips(beside)
            for kind in (agree > 0, agree < 0):
                chips[kind] /= max(1, kind.sum())
        score = max(score, correlation(chips, signs))
    chance = min(1.0, len(GRIDS) * _tail(score))
    return Detection(chance <= MAX_FALSE_POSITIVE, identifier, score, chance, beside)


def false_positive_probability(score: float) -> float:
    """At most this is the chance that an unmarked clip reaches `score` in any attempt.

    Chips are chosen and weighed by the picture and by the sync signs; only the other signs, of
    which they know nothing, are correlated with. The union over identifiers and attempts follows.
    """
    return min(1.0, 2.0**ID_BITS * ATTEMPTS * _tail(score))


def _tail(score: float) -> float:
    """Bounds the chance that random signs correlate so well with anything.

    It is at most 1 / (4 P(N > sqrt(2))) = 3.18 times that of a normal variable N: Bentkus and
    Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables",
    Bernoulli 21 (2015).
    """
    return min(1.0, math.erfc(score / math.sqrt(2)) / (4 * math.erfc(1)))
