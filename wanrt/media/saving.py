"""Results as files: watermark, encode, XMP, C2PA signature, read back, rename, ledger line.

This is the only way in which wanrt writes what a model made; `write_video` and `save_png` encode
and mark nothing. A file appears under its name when every layer is on it and has been read back.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from wanrt import env
from wanrt.errors import MarkingError, OutputError, UsageError
from wanrt.media import ledger, provenance, watermark, xmp
from wanrt.media.image import to_uint8
from wanrt.media.marking import REQUIRED, UNKNOWN, Marking, Origin, Saved
from wanrt.media.output import IMAGE_SUFFIX, PendingFile, check_output
from wanrt.media.sound import add_sound
from wanrt.media.video import Frames, check_codec, write_video

if TYPE_CHECKING:
    from wanrt.keys import SigningKey

log = logging.getLogger("wanrt")

_T = TypeVar("_T")

NOT_CARRIED = "not certain: the frames are too few, too small, too dark or too flat to carry one"
PRIVATE_KEY_NOTE = (
    "made a signing key of its own in %s, used from now on. Its signature proves that a file has "
    "not changed since; who made it, only to those you give root.pem. A certificate of yours: "
    "--key DIR or WANRT_KEYS"
)


def save_video(
    frames: Frames | Iterable[Frames],
    path: str | PathLike[str],
    fps: float = 16,
    *,
    codec: str = "h264",
    crf: int | None = None,
    overwrite: bool = False,
    origin: Origin = UNKNOWN,
    marking: Marking = REQUIRED,
) -> Saved:
    """Write frames of any generator as a marked `.mp4`, `.webm`, `.mkv`, or a single one as `.png`.

    frames: uint8 `[n, H, W, 3]` or float `[3, n, H, W]` in [-1, 1], or chunks of either; or images
    as PIL has them. Raises MarkingError where a mark is required and fails; no file is left then.
    """
    return Marker(marking).save(frames, path, fps, codec, crf, overwrite, origin)


class Marker:
    """Marks results, one after another. Make it before any work: it looks for key and ledger.

    A key is made where none is configured; an embedder that wants no such thing gives one.
    """

    def __init__(self, marking: Marking = REQUIRED) -> None:
        self.marking = marking
        self.missing: list[str] = []
        self.key: SigningKey | None = None
        self.ledger = marking.ledger or env.ledger_file()
        if marking.mode == "off":
            log.warning("marking is off: the result will not say that it is AI-generated")
        else:
            self.key = self.attempt("key", self._load_key, self.missing)
        if self.ledger is not None:
            self.attempt("ledger", lambda: ledger.check(self.ledger), self.missing)

    def _load_key(self) -> "SigningKey":
        from wanrt import keys  # and with it `cryptography`, 70 ms

        given = self.marking.key or env.keys_folder()
        if isinstance(given, keys.SigningKey):
            key = given
        else:
            folder = given or env.own_keys_folder()
            if given is None and not folder.exists():
                try:
                    keys.init(folder)
                    log.warning(PRIVATE_KEY_NOTE, folder)
                except OutputError as error:
                    if not folder.exists():  # else another process was quicker
                        raise MarkingError(f"no signing key: {error}") from error
            key = keys.load(Path(folder))
        key.check()
        provenance.library()
        return key

    def attempt(self, step: str, call: Callable[[], _T], missing: list[str]) -> _T | None:
        """Do a step of marking; a failure ends everything, or where allowed goes to `missing`."""
        try:
            return call()
        except (MarkingError, OSError) as error:
            if self.marking.mode == "required":
                if isinstance(error, MarkingError):
                    raise
                raise MarkingError(f"marking failed, {step}: {error.strerror or error}") from error
            log.warning("marking, %s: %s", step, error)
            missing.append(f"{step}: {error}")
            return None

    def check(
        self,
        path: str | PathLike[str],
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        num_frames: int | None = None,
    ) -> Path:
        """Whether a result can be written there, before any work: as `check_output`, and codec
        and manifest have a place too. Raises UsageError, OutputError.
        """
        target = check_output(path, overwrite, num_frames)
        check_codec(codec, crf, target)
        sidecar = self.sidecar(target)
        if sidecar is not None and sidecar.exists() and not overwrite:
            raise OutputError(f"{sidecar}, for the manifest, exists already (-y overwrites it)")
        return target

    def sidecar(self, target: Path) -> Path | None:
        """Where the manifest lies if that kind of file cannot hold one."""
        if self.marking.mode == "off" or target.suffix.lower() in provenance.EMBEDS:
            return None
        return provenance.sidecar_of(target)

    def save(
        self,
        frames: Frames | Iterable[Frames],
        path: str | PathLike[str],
        fps: float,
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        origin: Origin = UNKNOWN,
        sound: Path | None = None,
    ) -> Saved:
        """As `save_video`; sound: a video whose sound goes with the frames, as it is."""
        target = self.check(path, codec, crf, overwrite)
        if not self.marking.record_prompt:
            origin = replace(origin, prompt=None)
        mark = _Mark(self, target, origin, sound)
        try:
            write_video(target, mark.frames(frames), fps, codec, crf, overwrite, mark.seal)
        except BaseException:
            mark.withdraw()
            raise
        self._enter(mark)
        return mark.saved

    def _enter(self, mark: "_Mark") -> None:
        if self.ledger is None:
            return
        try:
            self.attempt("ledger", lambda: ledger.append(self.ledger, mark.record()), mark.missing)
        except MarkingError as error:
            state = "not marked" if self.marking.mode == "off" else "marked"
            raise MarkingError(f"{mark.target} is written and {state}, but: {error}") from error
        mark.saved = replace(mark.saved, missing=tuple(mark.missing))


class _Mark:
    """The marks of one result: they grow with the frames, then with the finished file."""

    def __init__(self, marker: Marker, target: Path, origin: Origin, sound: Path | None) -> None:
        self.marker, self.target, self.origin, self.sound = marker, target, origin, sound
        self.on = marker.marking.mode != "off"
        self.sidecar = marker.sidecar(target)
        self.saved = Saved(target, "", 0, marker.marking.mode)
        self.num_frames, self.missing = 0, list(marker.missing)
        self._identifier = secrets.randbits(32)
        self._watermark: watermark.Watermark | None = None
        self._sidecar_written = False

    def frames(self, given: Frames | Iterable[Frames]) -> Iterator[np.ndarray]:
        """uint8 `[n, H, W, 3]`, watermarked, chunk by chunk."""
        nearest = self.target.suffix.lower() == IMAGE_SUFFIX
        for chunk in [given] if isinstance(given, np.ndarray | Tensor) else given:
            frames = _as_uint8(chunk, nearest)
            self.num_frames += len(frames)
            if not self.on:
                yield frames
                continue
            if self.num_frames == len(frames) and min(frames.shape[1:3]) >= watermark.MIN_SIDE:
                self._watermark = watermark.Watermark(self._identifier, *frames.shape[1:3])
            yield frames if self._watermark is None else self._watermark.apply(frames)

    def seal(self, part: Path) -> None:
        """XMP and the signed manifest, read back; `part` then holds what gets the final name."""
        if self.sound is not None:
            with PendingFile(part) as mixed:
                add_sound(part, self.sound, mixed.part)
        if self.on:
            carried = self._watermark is not None and self._watermark.carried
            if not carried:
                log.warning("%s: watermark: %s", self.target, NOT_CARRIED)
            value = f"{self._identifier:08x}" if carried else None
            self.saved = replace(self.saved, watermark=value)
            if part.suffix.lower() in xmp.SUFFIXES:
                written = self.marker.attempt("XMP", lambda: self._write_xmp(part), self.missing)
                self.saved = replace(self.saved, xmp=bool(written))
            if self.marker.key is not None:
                label = self.marker.attempt("C2PA", lambda: self._sign(part), self.missing)
                self.saved = replace(self.saved, manifest=label)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size, missing = part.stat().st_size, tuple(self.missing)
        self.saved = replace(self.saved, sha256=digest, num_bytes=size, missing=missing)

    def _write_xmp(self, part: Path) -> bool:
        xmp.embed(part, self.origin.source_type, f"wanrt {version()}")
        found = xmp.read(part)
        if found != self.origin.source_type:
            raise MarkingError(f"the XMP reads back as {found!r}, not {self.origin.source_type}")
        return True

    def _sign(self, part: Path) -> str | None:
        if self.sidecar is None:
            with PendingFile(part) as signed:
                return self._sign_into(part, signed.part, signed.part)
        manifest = provenance.sidecar_of(part)
        try:
            label = self._sign_into(part, manifest, part)
            os.replace(manifest, self.sidecar)
        finally:
            manifest.unlink(missing_ok=True)
        self.saved = replace(self.saved, sidecar=self.sidecar)
        self._sidecar_written = True
        return label

    def _sign_into(self, part: Path, target: Path, signed: Path) -> str | None:
        """Sign, then judge `signed` as a stranger with the root would."""
        key, marking = self.marker.key, self.marker.marking
        value = self.saved.watermark
        bound = None if value is None else (watermark.NAME, value)
        details: dict[str, Any] = {"marking": marking.mode}
        if value is None:
            details["watermark"] = NOT_CARRIED
        statement = provenance.Statement(self.origin, version(), bound, details)
        provenance.sign(part, target, statement, key, marking.tsa)
        found = provenance.read(signed, key.root)
        wanted = ("trusted",) if key.root else ("trusted", "valid")
        stated = (found.source_type, found.watermark, found.time is not None)
        if found.state not in wanted or stated != (
            self.origin.source_type,
            bound,
            marking.tsa is not None,
        ):
            reasons = "; ".join(found.reasons) or f"it states {stated}"
            raise MarkingError(f"the signed file reads back as {found.state}: {reasons}")
        return found.label

    def withdraw(self) -> None:
        """The result will not appear: take back the manifest beside it."""
        if self._sidecar_written:
            self.sidecar.unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """What the ledger holds of it."""
        saved = asdict(self.saved)
        saved |= {"path": self.target.name, "sidecar": self.sidecar and self.sidecar.name}
        if self._watermark is not None:
            saved |= {
                "watermark": f"{self._identifier:08x}",
                "watermark_certain": self._watermark.carried,
            }
        return {
            "event": "saved" if self.on else "saved unmarked",
            **saved,
            "frames": self.num_frames,
            "model": self.origin.model,
            "task": self.origin.task,
            "source_type": self.origin.source_type,
            "inputs": [given.role for given in self.origin.inputs],
            "wanrt": version(),
        }


def _as_uint8(chunk: Any, nearest: bool) -> np.ndarray:
    """uint8 `[n, H, W, 3]` of a chunk or of one PIL image. Raises UsageError."""
    if isinstance(chunk, Tensor):
        floating = chunk.is_floating_point()
        if floating and chunk.ndim in (4, 5) and chunk.shape[-4] == 3:
            return to_uint8(chunk, nearest=nearest).cpu().numpy()
        frames = chunk.cpu().numpy()
    else:
        frames = np.require(chunk, requirements="W")  # PIL's arrays are read-only
        if frames.ndim == 3:
            frames = frames[None]
    if frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size:
        return frames
    raise UsageError(
        f"frames are uint8 [n, H, W, 3] or a float tensor [3, n, H, W] in [-1, 1], "
        f"not {frames.dtype} {list(frames.shape)}"
    )


def version() -> str:
    """Of wanrt as installed; "unknown" in a bare checkout."""
    try:
        return package_version("wanrt")
    except PackageNotFoundError:
        return "unknown"
