"""C2PA manifests (specification 2.2): signed into a file, and read back with a verdict."""

import io
import json
import logging
import mimetypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wanrt.errors import MarkingError
from wanrt.media.manifest import GENERATION, Manifest, SoftBinding, judged
from wanrt.media.marking import Input, Origin

if TYPE_CHECKING:
    import c2pa

    from wanrt.keys import SigningKey

log = logging.getLogger(__name__)

WATERMARK_ACTION = "c2pa.watermarked.bound"
EMBEDS = (".mp4", ".mov", ".m4v", ".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff")
SIDECAR = ".c2pa"
MAX_SIDECAR = 64 << 20
UNKNOWN_TYPE = "application/octet-stream"
_STORE = bytes.fromhex("6332706100110010800000aa00389b71")  # JUMBF type of a manifest store
# mimetypes knows these only where the system has a table of its own.
_MIME = {".mkv": "video/x-matroska", ".webm": "video/webm", ".avif": "image/avif"}

# Nothing is fetched, and no picture of an input gets into a manifest.
_SETTINGS: dict[str, Any] = {
    "verify": {
        "verify_after_sign": False,  # the caller reads the file back
        "verify_trust": True,
        "remote_manifest_fetch": False,
        "ocsp_fetch": False,
    },
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Statement:
    """What a manifest is to say: origin, version of wanrt, the watermark if there is one.

    details: further plain values of our own assertion.
    """

    origin: Origin
    version: str
    watermark: SoftBinding | None = None
    details: dict[str, Any] = field(default_factory=dict)


def library() -> Any:
    """c2pa, imported when first needed. Raises MarkingError where it cannot be loaded."""
    try:
        import c2pa
    except (ImportError, OSError) as error:
        raise MarkingError(
            f"the C2PA library cannot be loaded: {error} (pip install c2pa-python)"
        ) from error
    return c2pa


def mime_type(path: Path) -> str:
    """By the name's ending."""
    known = _MIME.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0]
    return known or UNKNOWN_TYPE


def sign(
    source: Path,
    target: Path,
    statement: Statement,
    key: "SigningKey",
    tsa: str | None = None,
) -> None:
    """Sign `source` into `target`, another path: the file with its manifest, or for formats that
    cannot hold one (WebM, Matroska) the manifest alone.

    Raises MarkingError: no signature, no time stamp from `tsa` (c2pa waits 30 s), no space.
    """
    assert source != target, f"{source=}"  # c2pa would leave an empty file
    c2pa = library()
    embedded = source.suffix.lower() in EMBEDS
    failures: list[BaseException] = []

    def signed(data: bytes) -> bytes:
        try:
            return key.sign(data)
        except Exception as error:  # c2pa would drop it, and fail without saying why
            failures.append(error)
            return b""

    try:
        builder = c2pa.Builder(_definition(statement), c2pa.Context.from_dict(_SETTINGS))
        for number, given in enumerate(statement.origin.inputs):
            _add_ingredient(builder, number, given)
        algorithm = c2pa.C2paSigningAlg[key.algorithm.upper()]
        signer = c2pa.Signer.from_callback(signed, algorithm, key.chain, tsa)
        if not embedded:
            builder.set_no_embed()
        with source.open("rb") as original, _Written(target, failures) as file:
            if embedded:
                builder.sign(signer, mime_type(source), original, file)
            else:
                file.write(builder.sign(signer, mime_type(source), original))
    except (c2pa.C2paError, OSError, KeyError) as error:
        reason = _sign_failure(failures[0] if failures else error, tsa)
        raise MarkingError(f"the C2PA manifest cannot be signed: {reason}") from error


class _Written(io.FileIO):
    """A file that remembers why it could not be written: c2pa hears of failures, not of reasons."""

    def __init__(self, path: Path, failures: list[BaseException]) -> None:
        super().__init__(path, "w+")
        self._failures = failures

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:  # a full disk may take a part
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failures.append(error)
            raise
        return len(data)


def _sign_failure(error: BaseException, tsa: str | None) -> str:
    text = str(error) or type(error).__name__
    if "http resolver" in text:
        return f"no time stamp from {tsa}: is it up? ({text})"
    return text


def _definition(statement: Statement) -> dict[str, Any]:
    """The manifest as c2pa takes it, without ingredients."""
    origin, tool = statement.origin, {"name": "wanrt", "version": statement.version}
    labels = [_label(number) for number in range(len(origin.inputs))]
    parent = any(given.parent for given in origin.inputs)
    first: dict[str, Any] = {
        "action": "c2pa.opened" if parent else "c2pa.created",
        "digitalSourceType": origin.source_type,
        "softwareAgent": tool,
    }
    files = [label for label, given in zip(labels, origin.inputs, strict=True) if given.path]
    if files:
        first["parameters"] = {"ingredientIds": files}
    actions, assertions = [first], []
    if (bound := statement.watermark) is not None:
        actions.append({"action": WATERMARK_ACTION, "softwareAgent": tool})
        binding = {"alg": bound.algorithm, "blocks": [{"scope": {}, "value": bound.id}]}
        assertions.append({"label": "c2pa.soft-binding", "data": binding})
    generation: dict[str, Any] = {
        "model": origin.model,
        "task": origin.task,
        "wanrt": tool["version"],
    }
    if origin.inputs:
        generation["inputs"] = [given.role for given in origin.inputs]
    if origin.prompt is not None:
        generation["prompt"] = origin.prompt
    assertions.append({"label": GENERATION, "data": generation | statement.details})
    actions_assertion = {"label": "c2pa.actions", "data": {"actions": actions}}
    return {"claim_generator_info": [tool], "assertions": [actions_assertion, *assertions]}


def _label(number: int) -> str:
    return f"input-{number}"


def _add_ingredient(builder: "c2pa.Builder", number: int, given: Input) -> None:
    """The input's hash and, when it has one, its own manifest."""
    if given.path is None:
        return
    relation = "parentOf" if given.parent else "inputTo"
    about = {"title": given.role, "relationship": relation, "label": _label(number)}
    with given.path.open("rb") as file:
        try:
            builder.add_ingredient(about, mime_type(given.path), file)
        except library().C2paError as error:
            log.warning("%s cannot be looked into for a manifest of its own: %s", given.path, error)
            file.seek(0)
            builder.add_ingredient(about, UNKNOWN_TYPE, file)


def sidecar_of(path: Path) -> Path:
    return path.with_suffix(SIDECAR)


def read(path: Path, root: str | None = None) -> Manifest:
    """Read and judge the manifest of a file, or the one beside it (the same name, `.c2pa`).

    root: PEM of certificates to trust. Needs no key and no network. Raises OSError, and
    MarkingError where the C2PA library cannot be loaded.
    """
    c2pa = library()
    trust = {} if root is None else {"trust": {"trust_anchors": root}}
    context = c2pa.Context.from_dict(_SETTINGS | trust)
    beside = sidecar_of(path)
    data = None
    if path.suffix.lower() not in EMBEDS and beside != path and beside.is_file():
        with beside.open("rb") as file:
            data = file.read(MAX_SIDECAR)
    with path.open("rb") as file:
        try:
            reader = c2pa.Reader(mime_type(path), file, data, context)
            state = reader.get_validation_state()
            found = json.loads(reader.json())
        except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
            return Manifest("missing")
        except c2pa.C2paError as error:
            there = data is not None or _holds_a_store(file)
            return Manifest("invalid" if there else "missing", (str(error),), sidecar=bool(data))
    return judged(state, found, data is not None)


def _holds_a_store(file: BinaryIO) -> bool:
    """Whether the type of a C2PA manifest store stands anywhere in a file that cannot be parsed."""
    file.seek(0)
    kept = b""
    while block := file.read(1 << 20):
        if _STORE in kept + block:
            return True
        kept = block[-len(_STORE) :]
    return False
