"""Marks a file that another generator made: its frames are watermarked and encoded anew."""

import logging
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from wanrt.errors import FormatError, UsageError
from wanrt.media import provenance
from wanrt.media.image import is_image, load_image, to_uint8
from wanrt.media.manifest import Manifest
from wanrt.media.mark import Extra
from wanrt.media.marking import REQUIRED, Input, Marking, Origin, Saved
from wanrt.media.saving import Marker
from wanrt.media.sound import has_sound
from wanrt.media.verification import find_watermark
from wanrt.media.video import VideoInfo, iter_frames, probe_video

log = logging.getLogger("wanrt")


def mark_file(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str = "unknown",
    codec: str | None = None,
    crf: int | None = None,
    overwrite: bool = False,
    marking: Marking = REQUIRED,
) -> Saved:
    """Write a marked copy; `source` stays as it is. Its sound is copied, its manifest is kept.

    codec: None takes av1 for `.webm` and h264 otherwise. A manifest of the source becomes the
    parent of the new one, whether it still holds or not; a watermark that is there already is
    strengthened, since each of two would read worse. Raises FormatError, UsageError, OutputError,
    MarkingError.
    """
    source, out = Path(source), Path(out)
    still = is_image(source)
    if not source.is_file():
        raise FormatError(source, "is a folder" if source.is_dir() else "no such file")
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out} is the input itself, which stays as it is (-o another name)")
    codec = codec or ("av1" if out.suffix.lower() == ".webm" else "h264")
    marker = Marker(marking)
    marker.check(out, codec, crf, overwrite, num_frames=1 if still else None)
    manifest = provenance.read(source)
    origin = Origin(model, "mark", _parent(source, manifest))
    found, _ = find_watermark(source, manifest)
    extra = Extra(identifier=None if found.id is None else int(found.id, 16))
    if still:
        picture = to_uint8(load_image(source)[:, None], nearest=True)
        return marker.save(picture, out, 1, codec, crf, overwrite, origin, extra)
    info = probe_video(source)
    _warn_of_uneven_times(source, info)
    if has_sound(source):
        extra = replace(extra, sound=source)
    return marker.save(iter_frames(source), out, info.fps, codec, crf, overwrite, origin, extra)


def _parent(source: Path, found: Manifest) -> tuple[Input, ...]:
    if found.state == "missing":
        return ()
    if found.state == "invalid":
        log.warning("%s has a manifest that does not hold: %s", source, "; ".join(found.reasons))
    return (Input("original", source, parent=True),)


def _warn_of_uneven_times(source: Path, info: VideoInfo) -> None:
    steps = np.diff(info.times)
    if len(steps) > 2 and np.ptp(steps[:-1]) > max(1, steps.mean() / 2):
        log.warning(
            "%s: its frames are not evenly timed; they will be, %g a second", source, info.fps
        )
