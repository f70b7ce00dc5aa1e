"""`wanrt bench watermark`: which attacks the watermark withstands, false alarms, PSNR and speed."""

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from wanrt.bench.measure import machine
from wanrt.bench.memory import insert
from wanrt.bench.watermark_attacks import ATTACKS, Attack, decode
from wanrt.bench.watermark_clips import LARGE, Subject, clouds, subjects
from wanrt.bench.watermark_report import Clip, FalseAlarms, Result, Row, Speed, markdown
from wanrt.errors import UsageError
from wanrt.media.watermark import Watermark
from wanrt.media.watermark_code import MESSAGE_BITS, best_path, message_bits
from wanrt.media.watermark_detect import judge, soft_bits
from wanrt.media.watermark_evidence import Evidence, correlation
from wanrt.media.watermark_key import grid_for, key

IDENTIFIER = 0x5EEDCA11
VIDEO_FRAMES = 33  # of a file that is given
_TIMED = 9


def main(videos: list[Path], only: str, crops: int, out: Path | None) -> None:
    """JSON lines as they come; the report between the marks of a page."""
    missing = [path for path in [*videos, *([out] if out else [])] if not path.is_file()]
    if missing:
        raise UsageError(f"no such file: {missing[0]}")
    chosen = [one for one in [*subjects(), *map(given, videos)] if only in one.name]
    if not chosen:
        raise UsageError(f"no clip has {only!r} in its name")
    about = machine("cpu")
    results = []
    for kind, result in _all(chosen, crops):
        print(json.dumps({"bench": "watermark", "kind": kind} | asdict(result) | about), flush=True)
        results.append(result)
    if out is not None:
        insert(out, markdown(results, about), "wanrt bench watermark")


def _all(chosen: list[Subject], crops: int) -> Iterator[tuple[str, Result]]:
    for subject in chosen:
        frames = subject.make()
        watermark = Watermark(IDENTIFIER, *frames.shape[1:3])
        marked = watermark.apply(frames)
        yield "clip", _clip(subject, frames, marked, watermark.carried)
        if watermark.carried:
            yield from (("attack", _attacked(subject, marked, attack)) for attack in ATTACKS)
    yield "speed", speed()
    if crops:
        yield "false alarms", false_alarms(chosen, crops)


def given(path: Path) -> Subject:
    """The first frames of a file."""
    return Subject(path.stem, "file", lambda: np.stack(list(islice(decode(path), VIDEO_FRAMES))))


def _clip(subject: Subject, frames: np.ndarray, marked: np.ndarray, carried: bool) -> Clip:
    count, height, width, _ = frames.shape
    error = np.mean(
        [np.square(a.astype(float) - b).mean() for a, b in zip(frames, marked, strict=True)]
    )
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Clip(subject.name, subject.group, f"{width}x{height}", count, psnr, carried)


def _attacked(subject: Subject, marked: np.ndarray, attack: Attack) -> Row:
    evidence = _evidence(attack.run(marked))
    found = judge(evidence)
    right = found.detected and found.identifier == IDENTIFIER
    grid = grid_for(*marked.shape[1:3])
    return Row(
        subject.name,
        subject.group,
        attack.name,
        attack.promised_nano if subject.group == "nano" else attack.promised,
        right,
        found.detected and not right,
        1.0 if right else _bits(evidence, grid),
        found.score,
        found.false_positive_probability,
    )


def _evidence(frames: Iterable[np.ndarray]) -> Evidence:
    evidence = Evidence()
    for frame in frames:
        evidence.add(frame)
    return evidence


def _bits(evidence: Evidence, grid: int) -> float:
    """The share of right bits, read as if nothing had been cropped or mirrored."""
    path = best_path(soft_bits(evidence.chips(grid)))
    return float((path == message_bits(IDENTIFIER)).sum() / MESSAGE_BITS)


def false_alarms(chosen: list[Subject], crops: int) -> FalseAlarms:
    """Random crops of 1 to 3 frames, 64 pixels or more each way, of the clips as they were."""
    rng = np.random.default_rng(5)
    detected, highest, correlations = 0, 0.0, []
    for index, subject in enumerate(chosen):
        frames = subject.make()
        for _ in range(crops * index // len(chosen), crops * (index + 1) // len(chosen)):
            evidence = _evidence(_random_crop(frames, rng))
            found = judge(evidence)
            grid = grid_for(*frames.shape[1:3])
            signs = key(grid).data_chips(IDENTIFIER)
            correlations.append(correlation(evidence.chips(grid), signs))
            detected += found.detected
            highest = max(highest, found.score)
    # Clopper-Pearson: exact for none, and the Poisson mean with a chance of 5 % for at most k.
    limit = 1 - 0.05 ** (1 / crops) if detected == 0 else _poisson_limit(detected) / crops
    mean, deviation = float(np.mean(correlations)), float(np.std(correlations))
    return FalseAlarms(crops, detected, limit, highest, mean, deviation)


def _random_crop(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count, height, width, _ = frames.shape
    rows, columns = rng.integers(64, height + 1), rng.integers(64, width + 1)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    first, number = rng.integers(0, count), rng.integers(1, 4)
    return frames[first : first + number, top : top + rows, left : left + columns]


def _poisson_limit(count: int) -> float:
    """The mean at which `count` or fewer events have a chance of 5 %, by bisection."""
    low, high = float(count), 10.0 * count + 10
    for _ in range(60):
        mean = (low + high) / 2
        chance = sum(
            math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1)
        )
        low, high = (mean, high) if chance > 0.05 else (low, mean)
    return high


def speed() -> Speed:
    """On clouds; what is looked at only once, whether the clip can be read, is done before."""
    frames = clouds(*LARGE)[:_TIMED]
    watermark = Watermark(IDENTIFIER, *LARGE)
    watermark.apply(frames)
    mark, look, evidence = [], [], Evidence()
    for frame in frames:
        begin = time.perf_counter()
        watermark.apply(frame[None])
        middle = time.perf_counter()
        evidence.add(frame)
        mark.append(middle - begin)
        look.append(time.perf_counter() - middle)
    judge(evidence)  # the transforms of the patterns are kept
    begin = time.perf_counter()
    judge(evidence)
    search = time.perf_counter() - begin
    return Speed(
        *(1e3 * seconds for seconds in (statistics.median(mark), statistics.median(look), search))
    )
