"""Results as files: watermark, encode, XMP, C2PA signature, read back, rename, ledger line.

This is the only way in which wanrt writes what a model made; `write_video` and `save_png` encode
and mark nothing. A file appears under its name when every layer is on it and has been read back.
"""

import logging
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt import env
from wanrt.clock import Clock
from wanrt.errors import MarkingError, OutputError
from wanrt.media import ledger, provenance
from wanrt.media.frames import Clip
from wanrt.media.mark import NOTHING_EXTRA, Extra, Mark, Steps, sidecar_for
from wanrt.media.marking import REQUIRED, UNKNOWN, Marking, Origin, Saved
from wanrt.media.output import check_output
from wanrt.media.video import check_codec, write_video

if TYPE_CHECKING:
    from wanrt.keys import SigningKey

log = logging.getLogger("wanrt")

PRIVATE_KEY_NOTE = (
    "made a signing key of its own in %s, used from now on. Its signature proves that a file has "
    "not changed since; who made it, only to those you give root.pem. A certificate of yours: "
    "--key DIR or WANRT_KEYS"
)


def save_video(
    frames: Clip,
    path: str | PathLike[str],
    fps: float = 16,
    *,
    codec: str = "h264",
    crf: int | None = None,
    overwrite: bool = False,
    origin: Origin = UNKNOWN,
    marking: Marking = REQUIRED,
    clock: Clock | None = None,
) -> Saved:
    """Write frames of any generator as a marked `.mp4`, `.webm`, `.mkv`, or a single one as `.png`.

    frames: uint8 `[n, H, W, 3]` or float `[3, n, H, W]` in [-1, 1], or parts of either one after
    the other; or PIL images. `clock` gets the phases watermark, encode and sign. Raises
    MarkingError where a mark is required and fails; no file is left then.
    """
    return Marker(marking, clock).save(frames, path, fps, codec, crf, overwrite, origin)


class Marker:
    """Marks results, one after another. Make it before any work: it looks for key and ledger.

    A key is made where none is configured; an embedder that wants no such thing gives one.
    """

    def __init__(self, marking: Marking = REQUIRED, clock: Clock | None = None) -> None:
        """clock: of what is saved from now on; it can be set anew for each result."""
        self.marking, self.steps = marking, Steps(marking.mode)
        self.clock = clock or Clock()
        self.ledger = Path(marking.ledger) if marking.ledger else env.ledger_file()
        self.key: SigningKey | None = None
        if marking.mode == "off":
            log.warning("marking is off: the result will not say that it is AI-generated")
        else:
            with self.clock.phase("sign"):
                self.key = self.steps.attempt("key", lambda: _key(marking))
        if self.ledger is not None:
            path = self.ledger
            self.steps.attempt("ledger", lambda: ledger.check(path))

    def check(
        self,
        path: str | PathLike[str],
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        num_frames: int | None = None,
    ) -> Path:
        """Whether a result can be written there; call it before any work.

        As `check_output`, and codec and manifest have a place too. Raises UsageError, OutputError.
        """
        target = check_output(path, overwrite, num_frames)
        check_codec(codec, crf, target)
        sidecar = sidecar_for(target, self.marking)
        if sidecar is not None and sidecar.exists() and not overwrite:
            raise OutputError(f"{sidecar}, for the manifest, exists already (-y overwrites it)")
        return target

    def save(
        self,
        frames: Clip,
        path: str | PathLike[str],
        fps: float,
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        origin: Origin = UNKNOWN,
        extra: Extra = NOTHING_EXTRA,
    ) -> Saved:
        """As `save_video`."""
        target = self.check(path, codec, crf, overwrite)
        clock = self.clock
        mark = Mark(target, origin, self.marking, self.key, self.steps.missing, extra)
        marked = clock.each("watermark", mark.frames(frames))
        seal = clock.within("sign", mark.seal)
        try:
            with clock.phase("encode"):
                write_video(target, marked, fps, codec, crf, overwrite, seal)
        except BaseException:
            mark.withdraw()
            raise
        with clock.phase("sign"):
            self._enter(mark)
        return replace(mark.saved, missing=tuple(mark.steps.missing))

    def _enter(self, mark: Mark) -> None:
        path = self.ledger
        if path is None:
            return
        try:
            mark.steps.attempt("ledger", lambda: ledger.append(path, mark.record()))
        except MarkingError as error:
            raise MarkingError(f"{mark.target} is written and marked, but: {error}") from error


def _key(marking: Marking) -> "SigningKey":
    """The caller's, else that of WANRT_KEYS, else wanrt's own. Raises MarkingError."""
    from wanrt import keys  # and with it `cryptography`, 70 ms

    provenance.library()
    given = marking.key or env.keys_folder()
    if isinstance(given, keys.SigningKey):
        key = given
    else:
        folder = Path(given or env.own_keys_folder())
        if given is None and not folder.exists():
            try:
                keys.init(folder)
                log.warning(PRIVATE_KEY_NOTE, folder)
            except OutputError as error:
                if not folder.exists():  # else another process was quicker
                    raise MarkingError(f"no signing key: {error}") from error
        key = keys.load(folder)
    key.check()
    return key
