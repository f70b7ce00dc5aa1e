"""The marks of one result: its watermark, its XMP, its signed manifest, its line in the ledger."""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wanrt.errors import MarkingError, OutputError
from wanrt.installed import release
from wanrt.media import provenance, watermark, xmp
from wanrt.media.frames import Clip, chunks_of
from wanrt.media.manifest import SoftBinding
from wanrt.media.marking import Marking, Mode, Origin, Saved
from wanrt.media.output import IMAGE_SUFFIX, PendingFile
from wanrt.media.sound import add_sound

if TYPE_CHECKING:
    from wanrt.keys import SigningKey

log = logging.getLogger("wanrt")

_T = TypeVar("_T")

NOT_CARRIED = (
    "not certain: the frames are too few, too small, too dark or too flat to carry one, "
    "or carry another already"
)


@dataclass
class Steps:
    """The steps of marking, of which each may fail: `missing` lists those that did."""

    mode: Mode
    missing: list[str] = field(default_factory=list)

    def attempt(self, step: str, call: Callable[[], _T]) -> _T | None:
        """Raises MarkingError where marks are required; else warns, and gives None."""
        try:
            return call()
        except (MarkingError, OutputError, OSError) as error:
            reason = str(error)
            if self.mode == "required":
                raise MarkingError(f"marking failed, {step}: {reason}") from error
            log.warning("marking, %s: %s", step, reason)
            self.missing.append(f"{step}: {reason}")
            return None


@dataclass(frozen=True)
class Extra:
    """What a copy keeps of its original: the sound of a video, the watermark's 32 bits."""

    sound: Path | None = None
    identifier: int | None = None


NOTHING_EXTRA = Extra()


class Mark:
    """Grows with the frames, then with the finished file; `saved` says how far it got."""

    def __init__(
        self,
        target: Path,
        origin: Origin,
        marking: Marking,
        key: "SigningKey | None",
        missing: list[str],
        extra: Extra = NOTHING_EXTRA,
    ) -> None:
        """key: None where nothing is to be signed. missing: what failed before."""
        self.target, self.marking, self.key, self.extra = target, marking, key, extra
        self.origin = origin if marking.record_prompt else replace(origin, prompt=None)
        self.on = marking.mode != "off"
        self.steps = Steps(marking.mode, list(missing))
        self.saved = Saved(target, "", 0, marking.mode)
        self.num_frames = 0
        kept = extra.identifier
        self._identifier = secrets.randbits(32) if kept is None else kept
        self._watermark: watermark.Watermark | None = None
        self._sidecar = sidecar_for(target, marking)
        self._replaced: bytes | None = None  # the manifest that lay there

    def frames(self, clip: Clip) -> Iterator[np.ndarray]:
        """uint8 `[n, H, W, 3]`, watermarked, chunk by chunk."""
        nearest = self.target.suffix.lower() == IMAGE_SUFFIX
        for frames in chunks_of(clip, nearest=nearest):
            size = frames.shape[1:3]
            if self.on and not self.num_frames and min(size) >= watermark.MIN_SIDE:
                self._watermark = watermark.Watermark(self._identifier, *size)
            self.num_frames += len(frames)
            yield frames if self._watermark is None else self._watermark.apply(frames)

    def seal(self, part: Path) -> None:
        """XMP and the signed manifest, read back; `part` then holds what gets the final name."""
        if self.extra.sound is not None:
            with PendingFile(part) as mixed:
                add_sound(part, self.extra.sound, mixed.part)
        if self.on:
            if self._watermark is not None and self._watermark.carried:
                self.saved = replace(self.saved, watermark=f"{self._identifier:08x}")
            else:
                log.warning("%s: watermark: %s", self.target, NOT_CARRIED)
            if part.suffix.lower() in xmp.SUFFIXES:
                written = self.steps.attempt("XMP", lambda: self._write_xmp(part))
                self.saved = replace(self.saved, xmp=bool(written))
            if self.key is not None:
                self._sign(part, self.key)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size, missing = part.stat().st_size, tuple(self.steps.missing)
        self.saved = replace(self.saved, sha256=digest, num_bytes=size, missing=missing)

    def _write_xmp(self, part: Path) -> bool:
        xmp.embed(part, self.origin.source_type, f"wanrt {version()}")
        found = xmp.read(part)
        if found != self.origin.source_type:
            raise MarkingError(f"it reads back as {found!r}, not {self.origin.source_type}")
        return True

    def _sign(self, part: Path, key: "SigningKey") -> None:
        """With a time stamp if one is asked for; without, where that fails and may."""
        label, tsa = None, self.marking.tsa
        if tsa is not None:
            label = self.steps.attempt("time stamp", lambda: self._place(part, key, tsa))
        if label is None:
            label = self.steps.attempt("C2PA", lambda: self._place(part, key, None))
        sidecar = None if label is None else self._sidecar
        self.saved = replace(self.saved, manifest=label, sidecar=sidecar)

    def _place(self, part: Path, key: "SigningKey", tsa: str | None) -> str:
        """Into the file or beside it; gives the manifest's label."""
        if self._sidecar is None:
            with PendingFile(part) as signed:
                return self._signed(part, signed.part, signed.part, key, tsa)
        draft = provenance.sidecar_of(part)
        try:
            label = self._signed(part, draft, part, key, tsa)
            if self._sidecar.exists():
                self._replaced = self._sidecar.read_bytes()
            os.replace(draft, self._sidecar)
        finally:
            draft.unlink(missing_ok=True)
        return label

    def _signed(
        self, part: Path, target: Path, judged: Path, key: "SigningKey", tsa: str | None
    ) -> str:
        """Sign `part` into `target`, then judge the file `judged` as a stranger with the root."""
        value = self.saved.watermark
        bound = None if value is None else SoftBinding(watermark.NAME, value)
        details = {"marking": self.marking.mode}
        if bound is None:
            details["watermark"] = NOT_CARRIED
        statement = provenance.Statement(self.origin, version(), bound, details)
        provenance.sign(part, target, statement, key, tsa)
        found = provenance.read(judged, key.root)
        wanted = ("trusted",) if key.root else ("trusted", "valid")
        said = (found.source_type, found.watermark, found.time is not None)
        meant = (self.origin.source_type, bound, tsa is not None)
        if found.state not in wanted or said != meant or found.label is None:
            reasons = "; ".join(found.reasons) or f"it says {said}, not {meant}"
            raise MarkingError(f"the signed file reads back as {found.state}: {reasons}")
        return found.label

    def withdraw(self) -> None:
        """The result will not appear: put back what lay beside it."""
        if self.saved.sidecar is None:
            return
        if self._replaced is None:
            self.saved.sidecar.unlink(missing_ok=True)
        else:
            self.saved.sidecar.write_bytes(self._replaced)

    def record(self) -> dict[str, Any]:
        """What the ledger holds of it: names of files without their folders, no prompt."""
        saved = asdict(self.saved)
        saved |= {"path": self.target.name, "sidecar": self.saved.sidecar and self._sidecar.name}
        if self._watermark is not None:
            certain = self._watermark.carried
            saved |= {"watermark": f"{self._identifier:08x}", "watermark_certain": certain}
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


def sidecar_for(target: Path, marking: Marking) -> Path | None:
    """Where the manifest lies if that kind of file cannot hold one."""
    if marking.mode == "off" or target.suffix.lower() in provenance.EMBEDS:
        return None
    return provenance.sidecar_of(target)


def version() -> str:
    """Of wanrt as installed; "unknown" in a bare checkout."""
    return release("wanrt") or "unknown"
