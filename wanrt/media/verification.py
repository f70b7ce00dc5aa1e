"""Is this file marked as AI-generated, by whom, and is it as it was signed? No key, no network."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from wanrt import env
from wanrt.errors import FormatError, UsageError
from wanrt.media import ledger, provenance, watermark, watermark_detect, xmp
from wanrt.media.image import is_image, load_image, to_uint8
from wanrt.media.manifest import Manifest
from wanrt.media.marking import AI_SOURCES
from wanrt.media.video import iter_frames

NO_MANIFEST = Manifest("missing")
MAX_FRAMES = 120  # that the watermark is looked for in
ROOT_FILE = "root.pem"  # as in wanrt.keys, which would bring `cryptography`

State = Literal["marked", "unmarked", "tampered", "invalid", "contradiction", "unreadable"]
EXIT_CODES: dict[State, int] = {
    "marked": 0,
    "unmarked": 1,
    "tampered": 3,
    "invalid": 3,
    "contradiction": 3,
    "unreadable": 3,
}


@dataclass(frozen=True)
class XmpLayer:
    """What the file's XMP states; unsigned, so anybody can have written it."""

    state: Literal["valid", "other source", "invalid", "missing"]
    source_type: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class WatermarkLayer:
    """id: eight hex digits. The probability is that of an unmarked video scoring as high.

    other: the id of a second mark, where the one that the manifest names is there too: that of
    something which the frames were made from.
    """

    detected: bool
    id: str | None
    score: float
    false_positive_probability: float
    algorithm: str = watermark.NAME
    num_frames: int = 0
    other: str | None = None


@dataclass(frozen=True)
class LedgerLayer:
    """Which line of a ledger this file is; by "sha256" the very bytes, by "watermark" a copy."""

    state: Literal["match", "no match"]
    by: Literal["sha256", "watermark"] | None = None
    line: int | None = None
    time: str | None = None


@dataclass(frozen=True)
class Layers:
    c2pa: Manifest
    xmp: XmpLayer
    watermark: WatermarkLayer
    ledger: LedgerLayer | None = None


@dataclass(frozen=True)
class Verification:
    """The verdict. reasons: what led to it, in plain words.

    state: "marked" if some layer says AI-generated and none speaks against it; "tampered" if a
    manifest is there and the file is not as it was signed; "invalid" if it is, by a certificate
    that has expired or was revoked; "contradiction" if the layers tell different things.
    """

    path: Path
    state: State
    layers: Layers
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def verify(
    path: str | PathLike[str],
    *,
    trust: str | PathLike[str] | None = None,
    ledger_file: str | PathLike[str] | None = None,
) -> Verification:
    """Look for every mark that a file may carry: MP4, MOV, PNG, WebM and others, from anybody.

    trust: a PEM file with certificates whose signatures count as trusted; by default the root of
    this machine's own key, if it has one. Raises FormatError for a file that is not there and for
    a broken ledger, UsageError for a `trust` that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(path, "is a folder" if path.is_dir() else "no such file")
    try:
        manifest = provenance.read(path, _root(trust))
        stated = _xmp(path)
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    mark, broken = find_watermark(path, manifest)
    match = None if ledger_file is None else _match(path, Path(ledger_file), mark)
    layers = Layers(manifest, stated, mark, match)
    state, reasons = _judge(layers, broken)
    return Verification(path, state, layers, reasons)


def _root(trust: str | PathLike[str] | None) -> str | None:
    path = (
        (env.keys_folder() or env.own_keys_folder()) / ROOT_FILE if trust is None else Path(trust)
    )
    try:
        text = path.read_text("ascii")
    except (OSError, ValueError) as error:
        if trust is None:  # no key here, or somebody else's
            return None
        raise UsageError(f"cannot read the certificates in {path}: {error}") from error
    if "BEGIN CERTIFICATE" in text:
        return text
    if trust is None:
        return None
    raise UsageError(f"{path} holds no certificates in PEM")


def _xmp(path: Path) -> XmpLayer:
    try:
        source = xmp.read(path)
    except FormatError as error:
        return XmpLayer("invalid", reason=error.reason)
    if source is None:
        return XmpLayer("missing")
    return XmpLayer("valid" if source in AI_SOURCES else "other source", source)


def find_watermark(
    path: Path, manifest: Manifest = NO_MANIFEST
) -> tuple[WatermarkLayer, FormatError | None]:
    """The watermark in the first 120 frames, and why no more of them could be decoded.

    If the frames carry the one to which a manifest that holds is bound, it is that one.
    """
    broken: list[FormatError] = []
    count = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal count
        try:
            for frame in islice(_pixels(path), MAX_FRAMES):
                count += 1
                yield frame
        except FormatError as error:
            broken.append(error)

    found = watermark_detect.detect(frames(), _bound(manifest))
    chance, ids = found.false_positive_probability, (found.identifier, found.other)
    read, other = (None if one is None else f"{one:08x}" for one in ids)
    layer = WatermarkLayer(found.detected, read, found.score, chance, num_frames=count, other=other)
    return layer, broken[0] if broken else None


def _bound(manifest: Manifest) -> int | None:
    """The identifier that a manifest names, if it holds and names one of ours."""
    named = manifest.watermark
    if named is None or named.algorithm != watermark.NAME or not manifest.unchanged:
        return None
    return int(named.id, 16) if re.fullmatch("[0-9a-f]{8}", named.id) else None


def _pixels(path: Path) -> Iterator[np.ndarray]:
    if is_image(path):
        yield to_uint8(load_image(path)[:, None], nearest=True)[0].cpu().numpy()
    else:
        yield from iter_frames(path)


def _match(path: Path, file: Path, mark: WatermarkLayer) -> LedgerLayer:
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    copy = None
    for entry in ledger.entries(file):
        if entry.record.get("sha256") == digest:
            return LedgerLayer("match", "sha256", entry.number, entry.record.get("time"))
        if mark.id is not None and entry.record.get("watermark") == mark.id:
            copy = LedgerLayer("match", "watermark", entry.number, entry.record.get("time"))
    return copy or LedgerLayer("no match")


def _judge(layers: Layers, broken: FormatError | None) -> tuple[State, tuple[str, ...]]:
    manifest, mark = layers.c2pa, layers.watermark
    if manifest.state == "invalid" and manifest.unchanged:
        told = "the file is as it was signed, but the signer's certificate does not hold"
        return "invalid", (told, *manifest.reasons)
    if manifest.state == "invalid":
        return "tampered", ("the C2PA manifest does not hold", *manifest.reasons)
    if broken is not None:
        return "unreadable", (broken.reason,)
    if against := list(_contradictions(layers)):
        return "contradiction", tuple(against)
    reasons = []
    if manifest.state == "missing":
        reasons.append("there is no C2PA manifest: never signed, or lost on the way")
        reasons += [f"C2PA cannot read the file: {reason}" for reason in manifest.reasons]
    elif manifest.source_type in AI_SOURCES:
        trust = "trusted" if manifest.state == "trusted" else "not known"
        reasons.append(f"signed by {manifest.signer}, {trust} here, and unchanged since")
    else:
        reasons.append("a valid C2PA manifest, which does not say AI-generated")
    says = manifest.state != "missing" and manifest.source_type in AI_SOURCES
    if layers.xmp.state == "valid":
        says = True
        reasons.append("its XMP says AI-generated")
    if mark.detected:
        says = True
        beside = f", beside {mark.other} of something it was made from" if mark.other else ""
        reasons.append(f"it carries the watermark {mark.id}{beside}")
    return ("marked" if says else "unmarked"), tuple(reasons)


def _contradictions(layers: Layers) -> Iterator[str]:
    bound, mark = layers.c2pa.watermark, layers.watermark
    if bound and bound.algorithm == mark.algorithm and mark.detected and bound.id != mark.id:
        yield f"the manifest is bound to watermark {bound.id}, the frames carry {mark.id}"
    sources = [s for s in (layers.c2pa.source_type, layers.xmp.source_type) if s is not None]
    ai = [source in AI_SOURCES for source in sources] + [True] * mark.detected
    if any(ai) and not all(ai):
        told = ", ".join(source.rpartition("/")[2] for source in sources)
        yield f"its metadata says {told}" + (", its watermark AI-generated" * mark.detected)
