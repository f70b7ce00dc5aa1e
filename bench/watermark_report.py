"""What `wanrt bench watermark` finds, and the tables of docs/watermark.md made of it."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

GROUPS = ("832x480", "256x256", "nano", "file")


@dataclass(frozen=True)
class Row:
    """One clip after one attack. `bits` is the share of the 48 bits read right."""

    clip: str
    group: str
    attack: str
    promised: bool
    detected: bool  # with the right identifier
    wrong: bool  # with another one
    bits: float
    score: float
    false_positive_probability: float


@dataclass(frozen=True)
class Clip:
    """A marked clip, before any attack."""

    clip: str
    group: str
    size: str
    num_frames: int
    psnr: float  # dB, of RGB, peak 255; infinite where nothing was changed
    carried: bool


@dataclass(frozen=True)
class FalseAlarms:
    """Unmarked crops that were searched. `limit` is the 95 % upper bound of the true rate."""

    crops: int
    detected: int
    limit: float
    highest_score: float  # of an identifier whose checksum held, wherever it was looked for
    mean: float  # of the correlation with one identifier's pattern, not cropped; 0 in theory
    deviation: float  # likewise; 1 in theory


@dataclass(frozen=True)
class Speed:
    """Medians on one core, milliseconds per frame of 832x480; a search per clip."""

    mark_ms: float
    read_ms: float
    search_ms: float


Result = Row | Clip | FalseAlarms | Speed


def markdown(results: list[Result], about: dict[str, str | int]) -> str:
    """Attacks by kind of clip, then each clip, then false alarms and speed."""
    rows = [one for one in results if isinstance(one, Row)]
    clips = [one for one in results if isinstance(one, Clip)]
    lines = [", ".join(f"{name} {value}" for name, value in about.items()) + ".", ""]
    lines += [*_attacks(rows), "", *_clips(clips, rows), ""]
    for one in results:
        if isinstance(one, FalseAlarms):
            lines += [_false_alarms(one), ""]
        if isinstance(one, Speed):
            lines += [
                f"One core, 832x480: {one.mark_ms:.1f} ms to mark a frame, {one.read_ms:.1f} ms to "
                f"read one, {one.search_ms:.0f} ms to search a clip for crops and find none.",
                "",
            ]
    return "\n".join(lines[:-1]) + "\n"


def _attacks(rows: list[Row]) -> Iterator[str]:
    groups = [group for group in GROUPS if any(row.group == group for row in rows)]
    yield f"| attack | {' | '.join(groups)} |"
    yield "|---|" + "---|" * len(groups)
    for attack in dict.fromkeys(row.attack for row in rows):
        cells = [_cell([r for r in rows if (r.attack, r.group) == (attack, g)]) for g in groups]
        yield f"| {attack} | {' | '.join(cells)} |"


def _cell(rows: list[Row]) -> str:
    """Detected of how many, and the mean share of right bits; bold where it is promised."""
    if not rows:
        return ""
    bits = statistics.fmean(row.bits for row in rows)
    text = f"{sum(row.detected for row in rows)}/{len(rows)}, {bits:.3f}"
    return f"**{text}**" if all(row.promised for row in rows) else text


def _clips(clips: list[Clip], rows: list[Row]) -> Iterator[str]:
    yield "| clip | size, frames | PSNR, dB | lowest score | promised, but not detected |"
    yield "|---|---|---|---|---|"
    for clip in clips:
        ours = [row for row in rows if row.clip == clip.clip and row.promised]
        missed = ", ".join(row.attack for row in ours if not row.detected)
        lowest = f"{min(row.score for row in ours):.1f}" if ours else "not carried"
        psnr = "unchanged" if math.isinf(clip.psnr) else f"{clip.psnr:.1f}"
        yield f"| {clip.clip} | {clip.size}, {clip.num_frames} | {psnr} | {lowest} | {missed} |"
    marked = [clip.psnr for clip in clips if clip.carried]
    wrong = sum(row.wrong for row in rows)
    if not marked:
        return
    yield ""
    yield (
        f"Median PSNR {statistics.median(marked):.1f} dB over {len(marked)} clips that carry the "
        f"mark. Wrong identifiers: {wrong} of {len(rows)} readings."
    )


def _false_alarms(one: FalseAlarms) -> str:
    return (
        f"False alarms: {one.detected} of {one.crops} unmarked crops, so with 95 % confidence a "
        f"rate below {one.limit:.2g}; the derived bound is 1e-06. Highest score "
        f"{one.highest_score:.1f}. Correlation with one pattern: mean {one.mean:.3f}, standard "
        f"deviation {one.deviation:.3f} (in theory 0 and 1)."
    )
