"""C2PA manifests: what they say, signed into a file, read back and judged (C2PA 2.2)."""

import json
import logging
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from wanrt.errors import MarkingError
from wanrt.media.marking import Input, Origin

if TYPE_CHECKING:
    import c2pa

    from wanrt.keys import SigningKey

log = logging.getLogger(__name__)

WATERMARK_ACTION = "c2pa.watermarked.bound"
GENERATION = "org.wanrt.generation"  # our own assertion
EMBEDS = (".mp4", ".mov", ".m4v", ".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff")
SIDECAR = ".c2pa"
MAX_SIDECAR = 64 << 20
MAX_DEPTH = 16  # of manifests within manifests that are looked through
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

State = Literal["trusted", "valid", "invalid", "missing"]


@dataclass(frozen=True)
class Statement:
    """What a manifest is to say: origin, tool, the watermark (algorithm and hex) if there is one.

    details: further plain values of our own assertion.
    """

    origin: Origin
    version: str
    watermark: tuple[str, str] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What the reader found.

    state: "trusted" if the signature and all hashes hold and the signer leads to a root that was
    given, "valid" if they hold and the signer is unknown. reasons: what failed, with C2PA's codes.
    """

    state: State
    reasons: tuple[str, ...] = ()
    label: str | None = None
    generator: str | None = None
    source_type: str | None = None
    watermark: tuple[str, str] | None = None  # algorithm, value
    generation: dict[str, Any] | None = None
    signer: str | None = None
    time: str | None = None  # of the time stamping authority
    ingredients: int = 0
    sidecar: bool = False


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
    return known or "application/octet-stream"


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
        except Exception as error:  # c2pa drops it, and fails without saying why
            failures.append(error)
            raise

    try:
        builder = c2pa.Builder(_definition(statement), c2pa.Context.from_dict(_SETTINGS))
        for number, given in enumerate(statement.origin.inputs):
            _add_ingredient(builder, number, given)
        algorithm = c2pa.C2paSigningAlg[key.algorithm.upper()]
        signer = c2pa.Signer.from_callback(signed, algorithm, key.chain, tsa)
        if not embedded:
            builder.set_no_embed()
        with source.open("rb") as original, target.open("w+b", buffering=0) as file:
            if embedded:
                builder.sign(signer, mime_type(source), original, file)
            else:
                file.write(builder.sign(signer, mime_type(source), original))
    except (c2pa.C2paError, OSError, KeyError) as error:
        reason = _sign_failure(failures[0] if failures else error, source, tsa)
        raise MarkingError(f"the C2PA manifest cannot be signed: {reason}") from error


def _sign_failure(error: BaseException, source: Path, tsa: str | None) -> str:
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
    bound = [label for label, given in zip(labels, origin.inputs, strict=True) if given.path]
    if bound:
        first["parameters"] = {"ingredientIds": bound}
    actions, assertions = [first], []
    if statement.watermark is not None:
        algorithm, value = statement.watermark
        actions.append({"action": WATERMARK_ACTION, "softwareAgent": tool})
        binding = {"alg": algorithm, "blocks": [{"scope": {}, "value": value}]}
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
        builder.add_ingredient(about, mime_type(given.path), file)


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
    return _manifest(state, found, data is not None)


def _holds_a_store(file: BinaryIO) -> bool:
    """Whether the type of a C2PA manifest store stands anywhere in a file that cannot be parsed."""
    file.seek(0)
    kept = b""
    while block := file.read(1 << 20):
        if _STORE in kept + block:
            return True
        kept = block[-len(_STORE) :]
    return False


def _manifest(state: str, found: dict[str, Any], sidecar: bool) -> Manifest:
    """`found` is the reader's JSON; what it quotes from the file may have any shape."""
    manifests, label = found.get("manifests") or {}, found.get("active_manifest")
    active = _table(manifests.get(label))
    results = _table(_table(found.get("validation_results")).get("activeManifest"))
    failures = _tables(results.get("failure")) or _tables(found.get("validation_status"))
    signature = _table(active.get("signature_info"))
    tool = next(iter(_tables(active.get("claim_generator_info"))), {})
    return Manifest(
        state={"Trusted": "trusted", "Valid": "valid"}.get(state, "invalid"),
        reasons=tuple(f"{row.get('code')}: {row.get('explanation', '')}" for row in failures),
        label=label,
        generator=" ".join(str(tool[key]) for key in ("name", "version") if key in tool) or None,
        source_type=_source_type(active, manifests, MAX_DEPTH),
        watermark=_watermark(active),
        generation=next(_assertions(active, GENERATION), None),
        signer=signature.get("issuer"),
        time=signature.get("time"),
        ingredients=len(_tables(active.get("ingredients"))),
        sidecar=sidecar,
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _assertions(manifest: dict[str, Any], label: str) -> Iterator[dict[str, Any]]:
    """The data of every assertion of this kind, whatever its version (`label`, `label.v2`)."""
    for row in _tables(manifest.get("assertions")):
        if re.fullmatch(re.escape(label) + r"(\.v\d+)?(__\d+)?", str(row.get("label"))):
            yield _table(row.get("data"))


def _source_type(manifest: dict[str, Any], manifests: dict[str, Any], depth: int) -> str | None:
    """What its actions state, else what the thing it was made from (its parent) states."""
    for data in _assertions(manifest, "c2pa.actions"):
        for action in _tables(data.get("actions")):
            if stated := action.get("digitalSourceType"):
                return str(stated)
    for ingredient in _tables(manifest.get("ingredients")):
        parent = _table(manifests.get(ingredient.get("active_manifest")))
        if ingredient.get("relationship") == "parentOf" and parent and depth:
            return _source_type(parent, manifests, depth - 1)
    return None


def _watermark(manifest: dict[str, Any]) -> tuple[str, str] | None:
    for data in _assertions(manifest, "c2pa.soft-binding"):
        for block in _tables(data.get("blocks")):
            return str(data.get("alg")), str(block.get("value"))
    return None
