"""What a C2PA manifest says, picked from the reader's JSON: a verdict, and what concerns AI."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

GENERATION = "org.wanrt.generation"  # our own assertion
MAX_DEPTH = 16  # of manifests within manifests that are looked through

State = Literal["trusted", "valid", "invalid", "missing"]


@dataclass(frozen=True)
class SoftBinding:
    """The watermark that a manifest names as that of the frames."""

    algorithm: str
    id: str  # eight hex digits, where it is ours


@dataclass(frozen=True)
class Manifest:
    """What the reader found.

    state: "trusted" if the signature and all hashes hold and the signer leads to a root that was
    given, "valid" if they hold and the signer is unknown. reasons: what failed, with C2PA's codes.
    time: that of a time stamp; time_trusted: its authority leads to a root that was given, too.
    """

    state: State
    reasons: tuple[str, ...] = ()
    label: str | None = None
    generator: str | None = None
    source_type: str | None = None
    watermark: SoftBinding | None = None
    generation: dict[str, Any] | None = None
    signer: str | None = None
    time: str | None = None
    time_trusted: bool = False
    ingredients: int = 0
    sidecar: bool = False

    @property
    def unchanged(self) -> bool:
        """Whether all hashes and the signature hold, whatever is wrong with the certificate."""
        about_signer = all(reason.startswith("signingCredential.") for reason in self.reasons)
        return self.state in ("trusted", "valid") or (bool(self.reasons) and about_signer)


def judged(state: str, found: dict[str, Any], sidecar: bool) -> Manifest:
    """Of c2pa's verdict and its JSON, in which what comes from the file may have any shape."""
    manifests, label = found.get("manifests") or {}, found.get("active_manifest")
    active = _table(manifests.get(label))
    results = _table(_table(found.get("validation_results")).get("activeManifest"))
    failures = _tables(results.get("failure")) or _tables(found.get("validation_status"))
    successes = _tables(results.get("success"))
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
        time_trusted=any(row.get("code") == "timeStamp.trusted" for row in successes),
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


def _watermark(manifest: dict[str, Any]) -> SoftBinding | None:
    for data in _assertions(manifest, "c2pa.soft-binding"):
        for block in _tables(data.get("blocks")):
            return SoftBinding(str(data.get("alg")), str(block.get("value")))
    return None
