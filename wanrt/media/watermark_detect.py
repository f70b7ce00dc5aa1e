"""Reads the watermark: from frames to an identifier and a bound on the chance of being wrong."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wanrt.media.watermark_align import Alignment, candidates, read, straight
from wanrt.media.watermark_code import ID_BITS, decode
from wanrt.media.watermark_evidence import SAMPLES, Evidence, correlation
from wanrt.media.watermark_key import GRIDS, key

MAX_FALSE_POSITIVE = 1e-6
# Every alignment that could be tried: fewer than 3 (grids) x 2 (mirrored) x 13^2 (scales) x 37^2
# (offsets) x 45^2 (places that the refinement can reach) < 2^32.
TESTS_BITS = 32


@dataclass(frozen=True)
class Detection:
    """What was read. `score` is in standard deviations of an unmarked picture's."""

    detected: bool
    identifier: int | None
    score: float
    false_positive_probability: float


def detect(frames: Iterable[np.ndarray]) -> Detection:
    """Read uint8 frames `[H, W, 3]`, one after the other; a picture is a clip of one frame."""
    evidence = Evidence()
    for frame in frames:
        evidence.add(frame)
    return judge(evidence)


def judge(evidence: Evidence) -> Detection:
    """What the frames that were added say. Crops are searched for only if nothing else is found."""
    best = Detection(False, None, 0.0, 1.0)
    if not evidence.num_frames:
        return best
    maps = [evidence.map(grid) for grid in GRIDS]
    plain = ((samples, straight(mirrored)) for samples in maps for mirrored in (False, True))
    searched = ((samples, how) for samples in maps for how in candidates(samples))
    for attempts in (plain, searched):
        for samples, how in attempts:
            found = _attempt(samples, how)
            if found.detected:
                return found
            best = max(best, found, key=lambda one: one.score)
    return best


def _attempt(samples: np.ndarray, how: Alignment) -> Detection:
    identifier = decode(soft_bits(samples, how))
    chips, here = read(samples, how), key(len(samples) // SAMPLES)
    if identifier is None:
        return Detection(False, None, correlation(chips, here.sync_chips()), 1.0)
    score = correlation(chips, here.chips(identifier))
    chance = false_positive_probability(score)
    detected = chance <= MAX_FALSE_POSITIVE
    return Detection(detected, identifier if detected else None, score, chance)


def soft_bits(samples: np.ndarray, how: Alignment) -> np.ndarray:
    """float `[144]`: the coded bits of a map, positive for 0."""
    here = key(len(samples) // SAMPLES)
    return (read(samples, how).ravel()[here.data] * here.signs[here.data]).sum(0)


def false_positive_probability(score: float) -> float:
    """At most this is the chance that an unmarked clip reaches `score` anywhere.

    Hoeffding: random signs correlate beyond t standard deviations with probability below
    exp(-t^2 / 2), whatever the picture. The union over all identifiers and alignments follows.
    """
    if score <= 0:
        return 1.0
    exponent = (ID_BITS + TESTS_BITS) * math.log(2) - score * score / 2
    return math.exp(min(exponent, 0.0))
